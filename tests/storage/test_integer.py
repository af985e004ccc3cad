"""Codes in a few bits: packed as written, decoded as said, on the grid that loses least."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htcompress.storage.integer import Integer, best_scales, column, nearest
from htcompress.storage.packing import packed, packed_bytes, unpacked
from htcompress.vocabulary import INTEGER_BITS


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_packing_is_that_of_one_large_number(bits: int, values: list[int]) -> None:
    codes = [value % (1 << bits) for value in values]
    # The oracle: all codes as the digits of one number, lowest first.
    whole = sum(code << (bits * k) for k, code in enumerate(codes))
    stored = packed(torch.tensor(codes, dtype=torch.uint8), bits)
    assert bytes(stored.tolist()) == whole.to_bytes(packed_bytes(len(codes), bits), "little")
    assert unpacked(stored, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", INTEGER_BITS)
@pytest.mark.parametrize("by_rows", [False, True])
def test_what_is_decoded(bits: int, by_rows: bool) -> None:
    codec, core = Integer(bits, by_rows), torch.randn(5, 7, 3) * torch.logspace(-3, 3, 5)[:, None, None]
    scales = codec.scales(core)
    parts = codec.encode(core, scales)
    found = codec.decode(parts, tuple(core.shape))
    codes = unpacked(parts[""], bits, core.numel()).reshape(core.shape).double()
    steps = parts["scales"].double().reshape(-1, 1, 1)
    assert torch.equal(found, ((codes + 0.5 - 2 ** (bits - 1)) * steps).float())
    assert torch.equal(found, codec.rounded(core, scales))
    assert torch.equal(codec.encode(found, scales)[""], parts[""])
    # Nothing on the grid is nearer, and what was cut off stands at its edge.
    levels = torch.arange(2**bits).double() + 0.5 - 2 ** (bits - 1)
    apart = (core.double()[..., None] - levels * steps[..., None]).abs()
    assert torch.allclose(apart.amin(-1), (core - found).abs().double(), atol=1e-6 * float(core.abs().max()))


@pytest.mark.parametrize("bits", INTEGER_BITS)
def test_scales_lose_no_more_than_any_other(bits: int) -> None:
    rows = torch.randn(3, 400, dtype=torch.float64)
    found = column(Integer(bits, by_rows=True).scales(rows), rows)

    def lost(scales: torch.Tensor) -> torch.Tensor:
        return (nearest(rows / scales, bits) * scales - rows).square().sum(1)

    for factor in torch.linspace(0.3, 3, 60):
        assert (lost(found) <= 1.05 * lost(found * factor)).all()


def test_a_normal_variable_loses_what_the_tables_say() -> None:
    """J. Max, Quantizing for minimum distortion, 1960, table II, uniform grids."""
    values = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits, wanted in ((2, 0.1188), (3, 0.03744), (4, 0.01154), (5, 0.003495)):
        scale = best_scales(values, bits)
        assert float((nearest(values / scale, bits) * scale - values).square().mean()) == pytest.approx(
            wanted, rel=0.03
        )


@pytest.mark.parametrize("core", [torch.zeros(3, 4), torch.zeros(0, 4), torch.tensor([[1e-30, 2e30]])])
@pytest.mark.parametrize("by_rows", [False, True])
def test_odd_cores(core: torch.Tensor, by_rows: bool) -> None:
    codec = Integer(3, by_rows)
    found = codec.decode(codec.encode(core), tuple(core.shape))
    assert found.shape == core.shape
    assert torch.isfinite(found).all()
    assert found.abs().max() if core.any() else not found.any()


def test_codes_of_another_type_are_refused() -> None:
    codec = Integer(4)
    parts = codec.encode(torch.randn(3, 4))
    with pytest.raises(ValueError, match="packed in bytes"):
        codec.decode({**parts, "": parts[""].int()}, (3, 4))

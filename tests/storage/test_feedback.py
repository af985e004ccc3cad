"""Babai's nearest plane against itself, number by number in the Kronecker product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from htcompress.native import library
from htcompress.storage import feedback
from htcompress.storage.feedback import nearest_plane, unit_lower

BITS = 40
"""So many levels that none is the outermost."""


def moment(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    return root.T @ (torch.logspace(0, -2, 2 * size, dtype=torch.float64)[:, None] * root)


def lower(metric: Tensor | None) -> Tensor | None:
    return None if metric is None else unit_lower(metric)[0]


def one_by_one(values: Tensor, steps: Tensor, metric: Tensor) -> Tensor:
    """The oracle: the numbers as a vector, the last first, in the whole metric."""
    factor, _ = unit_lower(metric)
    flat, every = values.reshape(-1), steps[:, None].expand(values.shape).reshape(-1)
    found = flat.clone()
    for k in range(len(flat) - 1, -1, -1):
        moved = flat[k] + factor[k + 1 :, k] @ (flat - found)[k + 1 :]
        found[k] = ((moved / every[k]).floor() + 0.5) * every[k]
    return found.reshape(values.shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 12), (40, 3), (3, 40), (33, 65), (70, 45)])
def test_equals_the_vector_algorithm(shape: tuple[int, int]) -> None:
    m, n = shape
    values, steps = torch.randn(m, n, dtype=torch.float64), torch.rand(m, dtype=torch.float64) + 0.5
    rows, cols = moment(m, 1), moment(n, 2)
    for own_rows, own_cols in ((rows, cols), (rows, None), (None, cols), (None, None)):
        metric = torch.kron(
            torch.eye(m, dtype=torch.float64) if own_rows is None else own_rows,
            torch.eye(n, dtype=torch.float64) if own_cols is None else own_cols,
        )
        found = nearest_plane(values, steps, BITS, lower(own_rows), lower(own_cols))
        assert torch.allclose(found, one_by_one(values, steps, metric), atol=1e-9)


@pytest.mark.skipif(library() is None, reason="there is no compiler")
@pytest.mark.parametrize("shape", [(2, 2), (31, 33), (64, 32), (70, 45), (33, 200)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_program_of_c_comes_to_the_same(shape: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n = shape
    values, steps = torch.randn(m, n, dtype=torch.float64), 4 * torch.rand(m, dtype=torch.float64) / (1 << bits)
    steps[m // 2] = 0
    rows, cols = lower(moment(m, 1)), lower(moment(n, 2))
    found = nearest_plane(values, steps, bits, rows, cols)
    monkeypatch.setattr(feedback, "library", lambda: None)
    assert torch.allclose(found, nearest_plane(values, steps, bits, rows, cols), rtol=0, atol=1e-12)
    assert not found[m // 2].any()
    # No level is beyond the outermost, which many numbers reach.
    kept = steps > 0
    largest = float((found[kept] / steps[kept, None]).abs().max())
    outermost = (1 << bits - 1) - 0.5
    assert largest == pytest.approx(outermost) if m * n > 100 else largest < outermost + 1e-9


def test_the_error_is_that_of_its_own_steps() -> None:
    """||E||^2 in the metric is at most what each number's half step is worth where all others are made up for."""
    rows, cols, steps = moment(20, 3), moment(30, 4), torch.full((20,), 0.3, dtype=torch.float64)
    values = torch.randn(20, 30, dtype=torch.float64)
    error = values - nearest_plane(values, steps, BITS, lower(rows), lower(cols))
    own = torch.outer(unit_lower(rows)[1], unit_lower(cols)[1])
    assert float((rows @ error @ cols * error).sum()) <= float((own * 0.15**2).sum())
    plain = values - ((values / 0.3).floor() + 0.5) * 0.3
    assert (rows @ error @ cols * error).sum() < (rows @ plain @ cols * plain).sum()


def test_moments_that_are_singular_are_damped() -> None:
    vector = torch.randn(6, dtype=torch.float64)
    for singular in (torch.outer(vector, vector), torch.zeros(6, 6, dtype=torch.float64)):
        factor, diagonal = unit_lower(singular)
        assert torch.isfinite(factor).all()
        assert (diagonal > 0).all()

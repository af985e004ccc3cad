"""Relative errors down to what a precision can hold are held; smaller ones are refused, and the least is named."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import NON_CONTIGUOUS, Drawn, dense_of, distance, drawn, examples
from torch import Tensor

from htcompress.errors import RequestError
from htcompress.forms.ht import HTMatrix
from htcompress.matrix import Layout
from htcompress.tensor import DimensionTree, HTTensor, ht_svd, pieces

FINE = (1e-6, 3e-8, 1e-9, 3e-10, 1e-11)


def fading(shape: tuple[int, ...], floor: float, *, seed: int = 0) -> Tensor:
    """A tensor whose unfoldings have singular values down to `floor` of the largest, in bases that are drawn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for k, size in enumerate(shape):
        fall = floor ** torch.linspace(0, 1, size, dtype=torch.float64)
        turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        x = torch.tensordot(turn * fall, x, dims=([1], [k])).movedim(0, k)
    return x


@examples(140)
@given(drawn(least=2, most=4, size=7), st.sampled_from([1e-2, 1e-5, 3e-9, 1e-12]), st.sampled_from(FINE))
def test_fine_errors_are_held(case: Drawn, floor: float, rtol: float) -> None:
    x = fading(case.shape, floor, seed=case.seed)
    assert distance(dense_of(ht_svd(x, case.tree, rtol=rtol)), x) <= rtol
    whole = ht_svd(x, case.tree)
    assert distance(dense_of(whole), x) < 1e-13
    assert distance(dense_of(whole.truncate(rtol=rtol)), x) <= rtol + 1e-13
    assert ht_svd(x, case.tree, rtol=rtol).parameters <= whole.parameters


def test_two_directions_far_apart() -> None:
    """The error that was 3e-9 where 3e-10 was asked for."""
    values = torch.tensor([1.0, 3e-9], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 2, dtype=torch.float64))[0] for n in (6, 7))
    x = (left * values) @ right.T
    for rtol, rank in ((3e-10, 2), (4e-9, 1)):
        h = ht_svd(x, DimensionTree.balanced(2), rtol=rtol)
        assert h.ranks == (rank, rank, 1)
        assert distance(dense_of(h), x) <= rtol
        assert h.truncate(rtol=rtol).ranks == (rank, rank, 1)
        assert HTMatrix.from_dense(x, Layout.order_two(6, 7), rtol=rtol).rank == rank


@pytest.mark.parametrize("shape", [(9, 10, 11), (3, 40, 3), (60, 2, 2)])
def test_small_chunks_hold_them_too(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    x = fading(shape, 1e-11)
    for nested in ((0, (1, 2)), ((2, 0), 1)):
        for rtol in FINE:
            whole = ht_svd(x, DimensionTree(nested), rtol=rtol)
            with monkeypatch.context() as patch:
                patch.setattr(pieces, "CHUNK", 50)
                parts = ht_svd(x, DimensionTree(nested), rtol=rtol)
            assert parts.ranks == whole.ranks
            assert distance(dense_of(parts), x) <= rtol


def test_the_singular_bases_of_a_tensor_tell_small_values() -> None:
    x = fading((8, 7, 6, 9), 1e-12)
    form, spectra = ht_svd(x, DimensionTree(NON_CONTIGUOUS)).canonical()
    for node in form.tree.nodes[:-1]:
        rest = [k for k in range(4) if k not in node.leaves]
        rows = prod(x.shape[k] for k in node.leaves)
        exact = torch.linalg.svdvals(x.permute(*node.leaves, *rest).reshape(rows, -1))
        kept = len(spectra[node.index])
        assert float((spectra[node.index] - exact[:kept]).abs().max()) < 1e-14 * float(exact[0])
        assert float(exact[kept:].norm()) < 1e-13 * float(exact[0])


@pytest.mark.parametrize("order", [2, 3, 5])
def test_float32_holds_what_it_can(order: int) -> None:
    tree, shape = DimensionTree.balanced(order), (9, 8, 6, 5, 4)[:order]
    x = fading(shape, 1e-5).float()
    with pytest.raises(RequestError, match="cannot be held") as refused:
        ht_svd(x, tree, rtol=1e-9)
    least = float(str(refused.value).partition("the smallest is ")[2].partition(". ")[0])
    assert 1e-7 < least < 2e-6
    for rtol in (1.01 * least, 1e-5):
        h = ht_svd(x, tree, rtol=rtol)
        assert h.dtype == torch.float32
        assert distance(dense_of(h), x) <= rtol
        assert distance(dense_of(h.truncate(rtol=rtol)), dense_of(h)) <= rtol
    assert distance(dense_of(ht_svd(x.double(), tree, rtol=1e-9)), x) <= 1e-9


@pytest.mark.parametrize("rtol", [0.0, 1e-15, 1e-300])
def test_what_no_precision_holds_is_refused(rtol: float) -> None:
    x, tree = torch.randn(4, 5, dtype=torch.float64), DimensionTree.balanced(2)
    held: HTTensor = ht_svd(x, tree)
    asked = (
        lambda: ht_svd(x, tree, rtol=rtol),
        lambda: held.truncate(rtol=rtol),
        lambda: HTMatrix.from_dense(x, Layout.order_two(4, 5), rtol=rtol),
    )
    for ask in asked:
        with pytest.raises(RequestError, match=r"float64: the smallest is \d"):
            ask()


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-160, 1e160])
@pytest.mark.parametrize("small", [1 << 22, 0])
def test_scales_whose_squares_leave_the_range(monkeypatch: pytest.MonkeyPatch, scale: float, small: int) -> None:
    monkeypatch.setattr("htcompress.tensor.hsvd._SMALL", small)
    dtype = torch.float32 if 1e-38 < scale < 1e38 else torch.float64
    x = (scale * fading((9, 10, 11), 1e-2)).to(dtype)
    for goal in ({"rtol": 0.1}, {"rtol": 1e-5}, {"max_parameters": 200}, {}):
        h = ht_svd(x, DimensionTree.balanced(3), **goal)
        one = ht_svd((x.double() / scale).to(dtype), DimensionTree.balanced(3), **goal)
        assert h.ranks == one.ranks
        # Divided first: the oracle squares, too.
        assert distance(dense_of(h) / scale, dense_of(one)) < 1e-4
        assert distance(dense_of(h) / scale, x.double() / scale) <= goal.get("rtol", 1.0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(broken: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = broken
    with pytest.raises(RequestError, match="not finite"):
        ht_svd(x, DimensionTree.balanced(2), rtol=0.1)

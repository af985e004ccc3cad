"""A layout folds a matrix as its modes say, and unfolds it again without a trace of padding."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import dense_of, distance, examples, random_ht
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.forms.ht import HTMatrix
from htcompress.matrix import Layout
from htcompress.matrix.folding import col_foldings, divisors, finer, pairs, row_foldings, with_slabs
from htcompress.tensor import DimensionTree, HTTensor
from htcompress.vocabulary import LayoutKind

modes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, object]:
    """Arguments of a layout of either kind, often padded."""
    row_modes, col_modes = draw(modes), draw(modes)
    kind = draw(st.sampled_from(["split", "paired", "order two"]))
    if kind == "paired":
        col_modes = (col_modes * 3)[: len(row_modes)]
    rows, cols = draw(st.integers(1, prod(row_modes))), draw(st.integers(1, prod(col_modes)))
    return {"kind": kind, "row_modes": row_modes, "col_modes": col_modes, "rows": rows, "cols": cols}


def build(arguments: dict[str, object]) -> Layout:
    rest = dict(arguments)
    kind = rest.pop("kind")
    if kind == "order two":
        return Layout.order_two(rest["rows"], rest["cols"])
    return getattr(Layout, kind)(rest.pop("row_modes"), rest.pop("col_modes"), **rest)


def folded_by_hand(layout: Layout, matrix: Tensor) -> Tensor:
    """Entry by entry: mixed-radix digits of row and column, the digit pair of leaf k is its index."""
    out = torch.zeros(layout.shape, dtype=matrix.dtype)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            index, row, col = [], i, j
            for m, n in zip(reversed(layout.row_modes), reversed(layout.col_modes), strict=True):
                index.append((row % m) * n + col % n)
                row, col = row // m, col // n
            out[tuple(reversed(index))] = matrix[i, j]
    return out


@examples(80)
@given(layouts())
def test_fold_is_mixed_radix_and_unfold_its_inverse(arguments: dict[str, object]) -> None:
    layout = build(arguments)
    matrix = torch.randn(layout.rows, layout.cols)
    folded = layout.fold(matrix)
    assert torch.equal(folded, folded_by_hand(layout, matrix))
    assert torch.equal(layout.unfold(folded), matrix)
    assert layout.shape == tuple(m * n for m, n in zip(layout.row_modes, layout.col_modes, strict=True))
    assert Layout.from_config(json.loads(json.dumps(layout.to_config()))) == layout


@examples(60)
@given(layouts(), st.integers(0, 2**16))
def test_the_matrix_is_the_unfolded_tensor(arguments: dict[str, object], seed: int) -> None:
    """Also in the compact form, and through the factors of a split layout."""
    layout = build(arguments)
    ranks = (*[2] * (len(layout.tree.nodes) - 1), 1)
    for tensor in (h := random_ht(layout.tree, layout.shape, ranks, seed=seed), h.compact()):
        matrix = HTMatrix(layout, tensor)
        expected = layout.unfold(dense_of(h))
        assert matrix.dense().shape == (layout.rows, layout.cols)
        assert distance(matrix.dense(), expected) < 1e-11
        assert matrix.parameters == sum(core.numel() for core in tensor.stored)
        if layout.is_split:
            rows, cols = matrix.factors()
            assert rows.shape == (layout.rows, matrix.rank)
            assert cols.shape == (layout.cols, matrix.rank)
            assert distance(rows @ cols.T, expected) < 1e-11
        else:
            assert matrix.factors() is None


def test_factors_of_halves_whose_trees_are_out_of_order() -> None:
    layout = Layout.split((2, 3, 4), (5, 2, 3), rows=23, cols=29, row_tree=(2, (0, 1)), col_tree=((1, 2), 0))
    h = random_ht(layout.tree, layout.shape, (2, 2, 3, 4, 3, 2, 2, 3, 2, 3, 1))
    assert h.tree.nested == ((2, (0, 1)), ((4, 5), 3))
    for tensor in (h, h.compact()):
        rows, cols = HTMatrix(layout, tensor).factors()
        assert distance(rows @ cols.T, layout.unfold(dense_of(h))) < 1e-12


@pytest.mark.parametrize(
    "layout", [Layout.order_two(7, 5), Layout.split((7,), (3, 2), cols=5), Layout.paired((3, 3), (1, 5), rows=7)]
)
def test_from_dense(layout: Layout) -> None:
    matrix = torch.randn(7, 5, dtype=torch.float64)
    assert distance(HTMatrix.from_dense(matrix, layout).dense(), matrix) < 1e-12
    assert distance(HTMatrix.from_dense(matrix, layout, rtol=0.3).dense(), matrix) <= 0.3
    assert HTMatrix.from_dense(matrix, layout, max_parameters=20).parameters <= 20


def test_order_two_is_the_truncated_svd() -> None:
    matrix = torch.randn(9, 6, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    h = HTMatrix.from_dense(matrix, Layout.order_two(9, 6), max_parameters=2 * 15)
    assert (h.rank, h.parameters) == (2, 30)
    assert distance(h.dense(), (u[:, :2] * s[:2]) @ vh[:2]) < 1e-12


def test_kinds() -> None:
    assert Layout.order_two(4, 6).kind is LayoutKind.SVD
    assert Layout.split((4,), (6,)) == Layout.order_two(4, 6)
    assert Layout.split((2, 2), (6,)).kind is LayoutKind.SPLIT
    assert Layout.paired((2, 2), (3, 2)).kind is LayoutKind.PAIRED
    assert Layout.paired((4,), (6,)).kind is LayoutKind.PAIRED  # one leaf: nothing is parted
    # A root that parts rows from columns makes a layout split, however it was written down.
    assert Layout(4, 6, (4, 1, 1), (1, 2, 3), DimensionTree((0, (1, 2)))).is_split
    assert not Layout(4, 6, (4, 1, 1), (1, 2, 3), DimensionTree(((0, 1), 2))).is_split
    assert not Layout(4, 6, (1, 1, 4), (2, 3, 1), DimensionTree(((0, 1), 2))).is_split  # columns left of rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 6, (2, 2), (2, 3, 1), DimensionTree.balanced(2)), "2 leaves"),
        ((4, 6, (2, 2), (2, 3), DimensionTree.balanced(3)), "3 leaves"),
        ((5, 6, (2, 2), (2, 3), DimensionTree.balanced(2)), "4 rows; the matrix has 5"),
        ((4, 7, (2, 2), (2, 3), DimensionTree.balanced(2)), "6 columns; the matrix has 7"),
        ((0, 6, (2, 0), (2, 3), DimensionTree.balanced(2)), "at least 1"),
    ],
)
def test_modes_that_do_not_fit(arguments: tuple, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Layout(*arguments)


def test_matrices_and_tensors_that_do_not_fit() -> None:
    layout = Layout.split((2, 2), (3, 2))
    for shape in ((4, 5), (5, 6), (6, 4)):
        with pytest.raises(ShapeError, match="4 x 6 matrix"):
            layout.fold(torch.zeros(shape))
    other_tree = HTTensor.zeros(DimensionTree.linear(4), (2, 2, 3, 2), (1,) * 7)
    other_shape = HTTensor.zeros(layout.tree, (2, 2, 2, 3), (1,) * 7)
    for tensor in (other_tree, other_shape):
        with pytest.raises(ShapeError, match="does not fit"):
            HTMatrix(layout, tensor)


# ---- foldings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 12, 13, 36, 97])
def test_divisors(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


def test_foldings_hold_what_is_folded() -> None:
    for n in range(1, 200):
        for extra in (0, 1, 37):
            found = col_foldings(n)
            assert (n,) in found
            found += [split for modes in found if len(modes) > 1 for split in finer(modes)]
            assert with_slabs((n,), n, extra) == (n + extra,)
            for folding in filter(None, (with_slabs(modes, n, extra) for modes in found)):
                assert prod(folding) >= n + extra
                assert min(folding) >= 1
        for pair in pairs(n):
            assert n <= prod(pair) <= 1.5 * n
    for gates in (1, 3, 4):
        for hidden in range(1, 80):
            found = row_foldings(gates, hidden)
            assert found[0] == (gates * hidden,)
            assert all(gates * hidden <= prod(folding) for folding in found)
            assert len(set(found)) == len(found)

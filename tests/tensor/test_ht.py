"""The algebra of HT tensors equals the algebra of the dense tensors that they stand for."""

from __future__ import annotations

from math import inf, sqrt

import pytest
import torch
from hypothesis import given
from oracles import (
    NON_CONTIGUOUS,
    Drawn,
    attainable_ranks,
    core_shape,
    dense_of,
    distance,
    drawn,
    examples,
    random_ht,
    spectra_of,
    squared_tail,
    unfolding,
)
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.tensor import DimensionTree, HTTensor, Identity, parameter_count

many = examples(50)


def decaying(tree: DimensionTree, shape: tuple[int, ...], ranks: tuple[int, ...], seed: int = 0) -> HTTensor:
    """A tensor whose singular values fall quickly at every edge."""
    h = random_ht(tree, shape, ranks, seed=seed)
    return h.map(lambda core: core * 0.3 ** torch.arange(core.shape[-1], dtype=core.dtype))


def turned(h: HTTensor) -> HTTensor:
    """The same tensor with its bases turned at random, so that large and small directions are mixed in every core."""
    cores = list(h.cores)
    for node in h.tree.nodes[:-1]:
        q = torch.linalg.qr(torch.randn(h.ranks[node.index], h.ranks[node.index], dtype=torch.float64))[0]
        cores[node.index] = cores[node.index] @ q
        axis = h.tree.nodes[node.parent].children.index(node.index)
        cores[node.parent] = torch.tensordot(q.T, cores[node.parent], dims=([1], [axis])).movedim(0, axis)
    return HTTensor.from_cores(h.tree, cores)


# ---- what it holds --------------------------------------------------------------------------------------


@many
@given(drawn())
def test_dense_is_the_sum_over_all_cores(case: Drawn) -> None:
    h = case.ht()
    assert h.dense().shape == case.shape
    assert distance(h.dense(), dense_of(h)) < 1e-12


def test_dense_of_a_tree_out_of_order() -> None:
    """By hand: node 2+0 and node 1+3, their modes put back in order."""
    h = random_ht(DimensionTree(NON_CONTIGUOUS), (2, 3, 4, 5), (2, 2, 3, 3, 2, 4, 1))
    u2, u0, b20, u1, u3, b13, root = h.cores
    by_hand = torch.einsum("ip,jq,kr,ls,rpx,qsy,xyz->ijkl", u0, u1, u2, u3, b20, b13, root)
    assert distance(h.dense(), by_hand) < 1e-12


def test_an_order_one_tensor_is_its_only_core() -> None:
    core = torch.arange(5.0).unsqueeze(1)
    h = HTTensor.from_cores(DimensionTree(0), [core])
    assert torch.equal(h.dense(), core[:, 0])
    assert (h.parameters, h.shape, h.ranks) == (5, (5,), (1,))
    assert torch.equal((h + h).dense(), 2 * core[:, 0])
    assert torch.equal((3.0 * h).dense(), 3 * core[:, 0])
    assert torch.equal(h.compact().dense(), core[:, 0])
    assert float(h.norm()) == pytest.approx(sqrt(30))
    assert torch.equal(h.truncate(ranks=(1,)).dense(), core[:, 0])
    assert h.canonical()[1][0].item() == pytest.approx(sqrt(30))


def test_gradients_reach_every_stored_core() -> None:
    h = random_ht(DimensionTree(NON_CONTIGUOUS), (2, 3, 2, 3), (2, 2, 3, 2, 2, 3, 1)).compact()
    stored = [core.clone().requires_grad_() for core in h.stored]

    def dense(*values: Tensor) -> Tensor:
        left = iter(values)
        return h.map(lambda _: next(left)).dense()

    assert torch.autograd.gradcheck(dense, stored)


# ---- algebra --------------------------------------------------------------------------------------------


@many
@given(drawn())
def test_arithmetic_is_that_of_the_dense_tensors(case: Drawn) -> None:
    x, y = case.ht(), case.ht(seed=1).compact()
    a, b = dense_of(x), dense_of(y)
    scale = float(a.norm() * b.norm())
    assert float(x.dot(y)) == pytest.approx(float((a * b).sum()), abs=1e-12 * scale)
    assert float(x.norm()) == pytest.approx(float(a.norm()), rel=1e-12)
    for result, expected in ((x + y, a + b), (x - y, a - b), (-2.5 * y, -2.5 * b), (y * 0.0, 0 * b)):
        assert float((dense_of(result) - expected).norm()) <= 1e-12 * float(a.norm() + b.norm())
    if x.tree.order > 1:
        assert (x + y).ranks == (*(2 * r for r in x.ranks[:-1]), 1)


@many
@given(drawn(least=2))
def test_the_norm_of_a_small_difference_is_accurate(case: Drawn) -> None:
    """Through inner products it would be lost: 1e-9 squared is below the rounding of 1."""
    x, change = case.ht(), 1e-9 * case.ht(seed=1)
    difference = (x + change) - x
    expected = float(dense_of(change).norm())
    assert abs(float(difference.norm()) - expected) <= 1e-13 * float(dense_of(x).norm()) + 1e-6 * expected


def test_operations_need_one_tree_and_shape() -> None:
    tree = DimensionTree.balanced(3)
    x = random_ht(tree, (2, 3, 4), (1,) * 5)
    for other in (
        random_ht(tree, (2, 3, 5), (1,) * 5),
        random_ht(DimensionTree.linear(3), (2, 3, 4), (1,) * 5),
    ):
        for operation in (HTTensor.dot, HTTensor.__add__, HTTensor.__sub__):
            with pytest.raises(ShapeError):
                operation(x, other)


@many
@given(drawn())
def test_orthogonal_frames(case: Drawn) -> None:
    h = case.ht().orthogonalise()
    assert distance(dense_of(h), dense_of(case.ht())) < 1e-12
    for node in h.tree.nodes[:-1]:
        frame = h.frame(node)
        assert distance(frame.T @ frame, torch.eye(frame.shape[1])) < 1e-12


@many
@given(drawn(least=2))
def test_canonical_holds_the_singular_vectors_of_every_unfolding(case: Drawn) -> None:
    x = dense_of(case.ht())
    h, spectra = case.ht().canonical()
    scale = float(x.norm())
    assert distance(dense_of(h), x) < 1e-7
    assert float(spectra[-1]) == pytest.approx(scale, rel=1e-12)
    for node, found, expected in zip(h.tree.nodes, spectra, spectra_of(x, h.tree), strict=False):
        assert len(found) == h.ranks[node.index]
        padded = torch.zeros(max(len(found), len(expected)), dtype=torch.float64)
        padded[: len(found)] = found
        padded[: len(expected)] -= expected
        assert float(padded.abs().max()) < 1e-7 * scale  # eigenvalues of Gram matrices: half the digits
        frame = h.frame(node)
        weighty = frame[:, found > 1e-7 * scale]  # a direction without weight may have lost its own below
        assert distance(weighty.T @ weighty, torch.eye(weighty.shape[1])) < 1e-12
        # The rows of U_t^T X_(t) are orthogonal, and as long as the singular values.
        rows = frame.T @ unfolding(x, node.leaves)
        assert float((rows @ rows.T - torch.diag(found.square())).norm()) < 1e-12 * scale**2


# ---- truncation -----------------------------------------------------------------------------------------


@many
@given(drawn(least=2, rank=4))
def test_slicing_keeps_the_bound_and_fits_the_root(case: Drawn) -> None:
    x = dense_of(case.ht())
    form, _ = case.ht().canonical()
    spectra = spectra_of(x, form.tree)
    ranks = tuple(max(1, r - 1) for r in form.ranks)
    part = form.sliced(ranks)
    assert all(a <= b for a, b in zip(part.ranks, ranks, strict=True))
    lost = x - dense_of(part)
    squared = float(lost.square().sum())
    noise = 1e-12 * float(x.square().sum())
    assert squared <= squared_tail(spectra, form.tree, ranks) + noise
    # No tensor of these ranks is nearer than the best matrix of the rank at any one edge.
    nearest = max(float(values[rank:].square().sum()) for values, rank in zip(spectra, ranks, strict=False))
    assert squared >= nearest - noise
    # The root is the best for its frames: what is lost is orthogonal to what is kept.
    assert abs(float((lost * dense_of(part)).sum())) <= noise


@many
@given(drawn(least=2))
def test_truncation_to_an_error(case: Drawn) -> None:
    x = decaying(case.tree, case.shape, case.ranks, case.seed)
    dense = dense_of(x)
    sizes = []
    for rtol in (0.5, 0.1, 1e-2, 1e-4, 1e-6):
        part = x.truncate(rtol=rtol)
        assert distance(dense_of(part), dense) <= rtol * (1 + 1e-9)
        sizes.append(part.compact().parameters)
    assert sizes == sorted(sizes)
    assert distance(dense_of(x.truncate()), dense) < 1e-7


@pytest.mark.parametrize("seed", range(5))
def test_the_root_is_fitted_to_what_is_left_of_both_sides(seed: int) -> None:
    """By hand: the projection of the tensor onto the sliced frames of the root's children."""
    form, _ = random_ht(DimensionTree.balanced(4), (4, 4, 4, 4), (4, 4, 6, 4, 4, 6, 1), seed=seed).canonical()
    part = form.sliced((2, 3, 4, 3, 2, 4, 1))
    matrix = dense_of(form).reshape(16, 16)
    left, right = (torch.linalg.qr(part.frame(part.tree.nodes[child]))[0] for child in part.tree.root.children)
    assert distance(dense_of(part).reshape(16, 16), left @ (left.T @ matrix @ right) @ right.T) < 1e-12


def test_truncation_to_ranks() -> None:
    x = random_ht(DimensionTree.balanced(4), (5, 5, 5, 5), (4, 4, 6, 4, 4, 6, 1))
    dense = dense_of(x)
    ranks = (3, 4, 2, 3, 3, 2, 1)
    part = x.truncate(ranks=ranks)
    assert part.ranks == ranks
    assert (dense - dense_of(part)).square().sum() <= squared_tail(spectra_of(dense, x.tree), x.tree, ranks)
    exact = x.truncate(ranks=(9,) * 7)
    assert distance(dense_of(exact), dense) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_truncation_in_float32_sees_below_the_square_root_of_its_rounding(seed: int) -> None:
    """Exact ranks 2 plus 3e-5 of another tensor: Gram matrices in float32 would see noise of 3e-4."""
    tree, shape, ranks = DimensionTree.balanced(4), (8, 8, 8, 8), (2,) * 6 + (1,)
    x, y = random_ht(tree, shape, ranks, seed=seed), random_ht(tree, shape, ranks, seed=seed + 100)
    mixed = turned(x + 3e-5 * float(x.norm() / y.norm()) * y).map(lambda core: core.float())
    _, spectra = mixed.canonical()
    for found, expected in zip(spectra, spectra_of(dense_of(mixed), tree), strict=False):
        assert distance(found[2:4], expected[2:4]) < 0.02
    for rtol, parameters in ((1e-4, parameter_count(tree, shape, ranks)), (1e-5, mixed.compact().parameters)):
        part = mixed.truncate(rtol=rtol)
        assert part.dtype == torch.float32
        assert part.compact().parameters <= parameters
        assert distance(dense_of(part), dense_of(mixed)) <= rtol


# ---- storage --------------------------------------------------------------------------------------------


@many
@given(drawn(rank=5))
def test_compact_is_the_same_tensor_in_the_numbers_that_were_counted(case: Drawn) -> None:
    h = case.ht()
    small = h.compact()
    assert distance(dense_of(small), dense_of(h)) < 1e-11
    assert distance(small.dense(), dense_of(small)) < 1e-12
    stored = sum(core.numel() for core in small.stored)
    assert small.parameters == stored == parameter_count(h.tree, h.shape, h.ranks)
    assert small.parameters <= h.parameters
    for node, core in zip(h.tree.nodes[:-1], small.cores, strict=False):
        shape = core_shape(h.tree, h.shape, h.ranks, node.index)
        assert (isinstance(core, Identity)) == (h.tree.order > 1 and shape[-1] ** 2 == torch.Size(shape).numel())
    for node in h.tree.nodes:
        assert small.core(node).shape == core_shape(h.tree, h.shape, h.ranks, node.index)
    assert all(isinstance(core, torch.Tensor) for core in small.expanded().cores)
    assert distance(small.expanded().dense(), dense_of(h)) < 1e-11
    assert small.compact().parameters == small.parameters
    assert distance(dense_of(small.compact()), dense_of(h)) < 1e-11


@many
@given(drawn(rank=5))
def test_zeros_has_the_structure_of_compact(case: Drawn) -> None:
    empty, small = HTTensor.zeros(case.tree, case.shape, case.ranks), case.ht().compact()
    assert (empty.shape, empty.ranks, empty.parameters) == (small.shape, small.ranks, small.parameters)
    shapes = [[tuple(core.shape) for core in h.cores] for h in (empty, small)]
    assert shapes[0] == shapes[1]
    assert not empty.dense().any()


def test_an_identity_at_the_root_is_shared_by_both_sides() -> None:
    """The truncated SVD stores r (M + N) numbers, a full-rank matrix M N."""
    tree = DimensionTree.balanced(2)
    for (m, n, r), expected in {(6, 9, 2): 30, (6, 9, 6): 54, (6, 6, 6): 36, (1, 5, 1): 5, (1, 1, 1): 1}.items():
        h = random_ht(tree, (m, n), (r, r, 1))
        small = h.compact()
        assert small.parameters == expected
        assert distance(dense_of(small), dense_of(h)) < 1e-12
    # A root of one number finds a place further down.
    balanced = DimensionTree.balanced(4)
    assert random_ht(balanced, (2, 3, 4, 5), (1,) * 7).compact().parameters == 14
    norms = [float(core.norm()) for core in random_ht(tree, (6, 6), (2, 2, 1)).orthogonalise().compact().cores[:2]]
    assert norms[0] == pytest.approx(norms[1])


@many
@given(drawn())
def test_balanced_cores_have_one_norm(case: Drawn) -> None:
    h = case.ht().compact()
    even = h.balance()
    assert distance(dense_of(even), dense_of(h)) < 1e-12
    norms = [float(core.norm()) for core in even.stored]
    assert max(norms) == pytest.approx(min(norms), rel=1e-9)
    nothing = 0.0 * h
    assert not nothing.balance().dense().any()


def test_balance_shares_the_singular_values_of_every_edge() -> None:
    tree, shape, ranks = DimensionTree.balanced(4), (9, 8, 7, 9), (3, 3, 4, 3, 3, 4, 1)
    h = turned(decaying(tree, shape, ranks))
    even = h.balance()
    assert distance(dense_of(even), dense_of(h)) < 1e-12
    for node in tree.nodes[:-1]:
        inside = torch.linalg.svdvals(even.frame(node))
        across = torch.linalg.svdvals(unfolding(dense_of(h), node.leaves))[: even.ranks[node.index]]
        # The frame below an edge has the square roots, whatever the scale of the frame.
        shares = inside / inside[0], (across / across[0]).sqrt()
        torch.testing.assert_close(*shares, rtol=1e-6, atol=1e-9)
        assert float(across[-1] / across[0]) < 0.5


def test_map_touches_stored_cores_only_and_leaves_the_original() -> None:
    h = random_ht(DimensionTree.balanced(4), (2, 3, 2, 3), (2, 3, 4, 2, 3, 4, 1)).compact()
    before = dense_of(h)
    narrow = h.map(lambda core: core.float())
    assert (h.dtype, narrow.dtype, narrow.device.type) == (torch.float64, torch.float32, "cpu")
    assert [isinstance(core, Identity) for core in narrow.cores] == [isinstance(core, Identity) for core in h.cores]
    assert any(isinstance(core, Identity) for core in h.cores)
    assert distance(narrow.dense(), before) < 1e-6
    assert narrow.dense().dtype == torch.float32
    assert torch.equal(dense_of(h), before)


def test_relative_error() -> None:
    h = random_ht(DimensionTree.balanced(2), (3, 4), (2, 2, 1))
    x = torch.randn(3, 4, dtype=torch.float64)
    assert h.relative_error(x) == pytest.approx(float((x - dense_of(h)).norm() / x.norm()))
    assert h.relative_error(torch.zeros(3, 4)) == inf
    assert (0.0 * h).relative_error(torch.zeros(3, 4)) == 0.0


# ---- misfits --------------------------------------------------------------------------------------------

FITTING = ((3, 2), (4, 2), (2, 2, 3), (5, 3), (3, 3, 1))
MISFITS = {
    "too few cores": FITTING[:-1],
    "too many cores": (*FITTING, (1, 1)),
    "a leaf of three axes": ((3, 1, 2), *FITTING[1:]),
    "an inner core of two axes": (*FITTING[:2], (4, 3), *FITTING[3:]),
    "a left rank": (*FITTING[:2], (3, 2, 3), *FITTING[3:]),
    "a right rank": (*FITTING[:2], (2, 3, 3), *FITTING[3:]),
    "a rank below the root": (*FITTING[:4], (2, 3, 1)),
    "the root's rank": (*FITTING[:4], (3, 3, 2)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_cores_that_do_not_fit(name: str) -> None:
    tree = DimensionTree(((0, 1), 2))
    assert HTTensor.from_cores(tree, [torch.zeros(shape) for shape in FITTING]).shape == (3, 4, 5)
    with pytest.raises(ShapeError):
        HTTensor.from_cores(tree, [torch.zeros(shape) for shape in MISFITS[name]])


def test_the_count_of_every_attainable_choice() -> None:
    """All ranks of a small tensor: predicted numbers equal stored ones, and rank one is the fewest."""
    for nested, shape in ((((0, 1), 2), (2, 3, 3)), (NON_CONTIGUOUS, (2, 2, 2, 3))):
        tree = DimensionTree(nested)
        counts = {}
        for ranks in attainable_ranks(tree, shape):
            counts[ranks] = random_ht(tree, shape, ranks).compact().parameters
            assert counts[ranks] == parameter_count(tree, shape, ranks)
        assert min(counts.values()) == counts[(1,) * len(tree.nodes)]

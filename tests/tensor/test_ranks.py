"""Ranks are counted exactly, and chosen about as well as by trying all of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from math import inf, prod, sqrt
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import NON_CONTIGUOUS, Drawn, attainable_ranks, dense_of, drawn, examples, squared_tail
from torch import Tensor

from htcompress.native import library
from htcompress.tensor import DimensionTree, RankModel, RankPoint, decompose, parameter_count, pareto, rank_path
from htcompress.tensor.ranks import _upwards, ranks_for_budget, ranks_for_error, refine_ranks


def numbers_stored(tree: DimensionTree, shape: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """By hand: every core but the identities, which are a square core below the root, and a square root
    beside which a child is stored, or, if it is one number, anything."""
    stored = {}
    for node in tree.nodes[:-1]:
        below = shape[node.leaves[0]] if node.children is None else prod(ranks[c] for c in node.children)
        stored[node.index] = 0 if below == ranks[node.index] else below * ranks[node.index]
    left, right = tree.root.children
    below = stored.values() if ranks[left] == 1 else (stored[left], stored[right])
    absorbed = ranks[left] == ranks[right] and any(below)
    return sum(stored.values()) + (0 if absorbed else ranks[left] * ranks[right])


@examples(100)
@given(drawn(least=2, size=6, rank=6))
def test_the_count_is_that_of_the_stored_cores(case: Drawn) -> None:
    expected = numbers_stored(case.tree, case.shape, case.ranks)
    assert parameter_count(case.tree, case.shape, case.ranks) == expected
    spectra = [torch.ones(r) for r in case.ranks]
    assert RankModel(case.tree, case.shape, spectra).parameters(case.ranks) == expected


def test_the_count_of_known_forms() -> None:
    two = DimensionTree.balanced(2)
    assert parameter_count(two, (256, 3600), (5, 5, 1)) == 5 * (256 + 3600)
    assert parameter_count(two, (256, 3600), (256, 256, 1)) == 256 * 3600
    assert parameter_count(DimensionTree(0), (17,), (1,)) == 17
    # Leaves 4 r, inner nodes r^2 * 3 and 3 shared at the root.
    assert parameter_count(DimensionTree.balanced(4), (9, 9, 9, 9), (2, 2, 3, 2, 2, 3, 1)) == 4 * 18 + 2 * 12


# ---- what a choice costs and loses ----------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A decomposed tensor, and all its attainable ranks."""

    x: Tensor
    model: RankModel
    spectra: tuple[Tensor, ...]
    points: list[RankPoint]

    @classmethod
    def of(cls, x: Tensor, tree: DimensionTree) -> Problem:
        found = decompose(x, tree)
        points = []
        for ranks in attainable_ranks(tree, tuple(x.shape)):
            tail = squared_tail(found.spectra, tree, ranks)
            points.append(RankPoint(ranks, numbers_stored(tree, tuple(x.shape), ranks), tail))
        return cls(x, found.model, found.spectra, points)

    def best(self, budget: int) -> float:
        """The least bound on the squared error of all that fit."""
        return min(p.tail for p in self.points if p.parameters <= budget)

    def fewest(self, tail: float) -> int:
        """The fewest numbers of all within the bound."""
        return min(p.parameters for p in self.points if p.tail <= tail)

    @property
    def budgets(self) -> range:
        least = min(p.parameters for p in self.points if max(p.ranks) == 1)
        return range(least, self.x.numel() + 1, max(1, self.x.numel() // 15))


def random_tree(rng: random.Random, order: int) -> DimensionTree:
    parts: list = list(range(order))
    while len(parts) > 1:
        a, b = rng.sample(range(len(parts)), 2)
        parts = [part for i, part in enumerate(parts) if i not in (a, b)] + [(parts[a], parts[b])]
    return DimensionTree(parts[0])


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """Small tensors of order 2 to 4, half of them with quickly falling singular values."""
    rng, found = random.Random(0), []
    for seed in range(40):
        order = 2 + seed % 3
        shape = [rng.randint(1, 6) for _ in range(order)]
        x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for k, size in enumerate(shape):
            falling = (0.5 if seed % 2 else 1.0) ** torch.arange(size, dtype=torch.float64)
            x = x * falling.reshape(-1, *[1] * (order - k - 1))
        found.append(Problem.of(x, random_tree(rng, order)))
    return found


def test_the_bound_holds_for_every_choice(problems: list[Problem]) -> None:
    for problem in problems[:6]:
        found = decompose(problem.x, problem.model.tree)
        scale = float(problem.x.square().sum())
        for point in problem.points[:: max(1, len(problem.points) // 20)]:
            assert found.model.tail(point.ranks) == pytest.approx(point.tail, abs=1e-12 * scale)
            lost = problem.x - dense_of(found.truncate(point.ranks))
            assert float(lost.square().sum()) <= point.tail + 1e-12 * scale


def test_the_offset_is_part_of_the_bound() -> None:
    tree, spectra = DimensionTree.balanced(2), [torch.tensor([2.0, 1.0])] * 2 + [torch.tensor([3.0])]
    model = RankModel(tree, (3, 4), spectra, offset=0.5)
    assert [model.tail((r, r, 1)) for r in (1, 2)] == [1.5, 0.5]


# ---- the way from rank one ------------------------------------------------------------------------------


def test_the_path_rises_and_its_bounds_fall(problems: list[Problem]) -> None:
    for problem in problems:
        path = rank_path(problem.model)
        known = {point.ranks: point for point in problem.points}
        for point in path:
            assert point.parameters == known[point.ranks].parameters
            assert point.tail == pytest.approx(known[point.ranks].tail, abs=1e-12)
        for a, b in pairwise(path):
            assert a.parameters < b.parameters
            assert a.tail > b.tail
        assert path[-1].tail <= 1e-12 * float(problem.x.square().sum())
        limit = problem.x.numel() // 2
        assert all(p.parameters <= limit for p in rank_path(problem.model, max_parameters=limit)[1:])


def test_with_one_edge_the_path_is_every_rank_that_pays() -> None:
    """Also with equal singular values, and next to full rank, which costs less than the ranks before it."""
    for values in (torch.ones(8), 0.9 ** torch.arange(8.0)):
        model = RankModel(DimensionTree.balanced(2), (8, 120), [values, values, values.norm().reshape(1)])
        assert [p.ranks[0] for p in rank_path(model)] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert [p.parameters for p in rank_path(model)] == [128 * r for r in range(1, 8)] + [960]
        assert [p.ranks[0] for p in rank_path(model, max_parameters=400)] == [1, 2, 3]


def test_the_path_goes_on_to_full_rank_where_that_is_smaller_than_what_is_before_it() -> None:
    values = 0.9 ** torch.arange(8.0)
    model = RankModel(DimensionTree.balanced(2), (8, 9), [values, values, values.norm().reshape(1)])
    path = rank_path(model, max_parameters=75)
    assert [p.parameters for p in path] == [17, 34, 51, 68, 72]
    assert path[-1].tail == 0


def test_with_full_leaves_the_path_is_that_of_the_truncated_svd() -> None:
    """The leaves of the rows, 2 x 3, lose by every number that is cut: full as soon as the root's rank is 2."""
    leaves, root = {0: torch.full((2,), 100.0), 1: torch.full((3,), 100.0)}, 0.9 ** torch.arange(6.0)
    tree = DimensionTree(((0, 1), 2))
    spectra = [leaves.get(n.leaves[0], root) if n.is_leaf else root for n in tree.nodes[:-1]]
    model = RankModel(tree, (2, 3, 50), [*spectra, root.norm().reshape(1)])
    last = [p for p in rank_path(model) if p.tail < 100]
    assert [p.parameters for p in last] == [r * (6 + 50) for r in range(2, 6)] + [6 * 50]


@examples(60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_pareto_keeps_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    points = [RankPoint((), cost, float(tail)) for cost, tail in pairs]
    kept = [(p.parameters, p.tail) for p in pareto(points)]
    better = {(a, b) for a, b in pairs if not any((c <= a and d <= b) and (c, d) != (a, b) for c, d in pairs)}
    assert kept == sorted(better)


# ---- the choice -----------------------------------------------------------------------------------------


def test_ranks_for_a_budget_are_close_to_the_best(problems: list[Problem]) -> None:
    """Relative errors against trying all ranks: 1 % above on average."""
    ratios = []
    for problem in problems:
        scale = float(problem.x.square().sum())
        for budget in problem.budgets:
            ranks = ranks_for_budget(problem.model.tree, problem.model.shape, problem.spectra, budget)
            assert numbers_stored(problem.model.tree, problem.model.shape, ranks) <= budget
            tail, best = problem.model.tail(ranks), problem.best(budget)
            assert tail >= best - 1e-12 * scale
            ratios.append(1.0 if tail <= 1e-12 * scale else sqrt(tail / best))
    assert len(ratios) > 300
    assert mean(ratios) < 1.015
    assert sorted(ratios)[int(0.95 * len(ratios))] < 1.05
    assert max(ratios) < 1.8


def test_ranks_for_an_error_are_close_to_the_fewest(problems: list[Problem]) -> None:
    """Numbers against trying all ranks: 1 % above on average."""
    ratios = []
    for problem in problems:
        scale = float(problem.x.square().sum())
        for rtol in (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 1e-2, 1e-3):
            ranks = ranks_for_error(problem.model.tree, problem.model.shape, problem.spectra, rtol**2 * scale)
            assert problem.model.tail(ranks) <= rtol**2 * scale
            numbers = numbers_stored(problem.model.tree, problem.model.shape, ranks)
            ratios.append(numbers / problem.fewest(rtol**2 * scale))
    assert min(ratios) >= 1
    assert mean(ratios) < 1.01
    assert sorted(ratios)[int(0.95 * len(ratios))] < 1.05


def test_every_rank_of_an_svd_is_the_fewest_for_its_error() -> None:
    values = torch.linspace(2.0, 1.0, 13, dtype=torch.float64)
    spectra = (values, values, values.norm().reshape(1))
    for rank in range(1, 10):
        tail = float(values[rank:].square().sum())
        assert ranks_for_error(DimensionTree.balanced(2), (13, 31), spectra, tail * 1.0001) == (rank, rank, 1)


def test_no_budget_too_small_has_ranks() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    tree = DimensionTree(((2, 0), 1))
    spectra = decompose(x, tree).spectra
    assert ranks_for_budget(tree, (3, 4, 5), spectra, 12) == (1,) * 5
    assert ranks_for_budget(tree, (3, 4, 5), spectra, 11) is None
    assert ranks_for_budget(tree, (3, 4, 5), spectra, 10**6) == decompose(x, tree).tensor.ranks


def test_local_search_never_loses(problems: list[Problem]) -> None:
    gained = 0
    for problem in problems:
        for start in problem.points[:: max(1, len(problem.points) // 5)]:
            after = refine_ranks(problem.model, start, start.parameters)
            assert after.parameters <= start.parameters
            assert after.tail <= start.tail
            gained += after.tail < start.tail
    assert gained > 0


def test_a_tree_out_of_order_and_equal_values() -> None:
    """Nothing to tell the edges apart: the budget is still kept, and full rank still found."""
    tree, shape = DimensionTree(NON_CONTIGUOUS), (3, 2, 3, 2)
    spectra = tuple(torch.ones(n) for n in (3, 3, 4, 2, 2, 4, 1))
    last = inf
    for budget in range(10, 60):
        ranks = ranks_for_budget(tree, shape, spectra, budget)
        if ranks is None:
            continue
        assert numbers_stored(tree, shape, ranks) <= budget
        last = RankModel(tree, shape, spectra).tail(ranks)
    assert last == 0.0


# ---- by the program of C --------------------------------------------------------------------------------

NESTED = {
    "two": (0, 1),
    "one beside two": (0, (1, 2)),
    "four": ((0, 1), (2, 3)),
    "seven": (((0, 1), 2), ((3, 4), (5, 6))),
}


@pytest.mark.skipif(library() is None, reason="there is no compiler")
@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("decay", [1, 3])
@pytest.mark.parametrize("limits", [(1000, 0.0), (5000, 0.0), (inf, 0.0), (inf, 0.5)])
def test_the_program_of_c_climbs_alike(
    name: str, decay: int, limits: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = DimensionTree(NESTED[name])
    shape = (30, 40, 24, 20, 6, 12, 5)[: tree.order]
    generator = torch.Generator().manual_seed(decay)
    sizes = [prod(shape[leaf] for leaf in node.leaves) for node in tree.nodes]
    lengths = [min(size, prod(shape) // size, 150) for size in sizes]
    spectra = [torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True)[0] for n in lengths]
    model = RankModel(tree, shape, [values**decay for values in spectra], offset=0.1)
    most, tail = limits
    found = _upwards(model, max_parameters=most, max_tail=tail)
    monkeypatch.setattr("htcompress.tensor.ranks.library", lambda: None)
    wanted = _upwards(model, max_parameters=most, max_tail=tail)
    assert found[0] == wanted[0]
    assert len(wanted) > 10
    assert pareto(found) == pareto(wanted)


@pytest.mark.skipif(library() is None, reason="there is no compiler")
def test_the_program_of_c_asks_for_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = DimensionTree(NESTED["four"])
    model = RankModel(tree, (9, 9, 9, 9), [torch.ones(1 if node.parent is None else 9) for node in tree.nodes])
    wanted = rank_path(model)
    monkeypatch.setattr("htcompress.tensor.climbing._ROOM", 3)
    assert rank_path(model) == wanted

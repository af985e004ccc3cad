"""The search for a layout is never worse than the truncated SVD, exact about its budget, and finds structure."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product

import pytest
import torch
from crossing import crossed
from oracles import observed, roots_of, svd_error, weighted_error
from searching import search_of
from torch import Tensor

from htcompress.forms import ht_search
from htcompress.forms.form import Choice, Columns, front
from htcompress.forms.ht import HTMatrix
from htcompress.forms.ht_decompose import RootSplit, SplitCandidate
from htcompress.forms.ht_search import HTSearch
from htcompress.forms.refine import refine_cores
from htcompress.matrix import Metric
from htcompress.matrix.weighted import WeightedMatrix, relative
from htcompress.vocabulary import LayoutKind

WITH_SVD = (LayoutKind.AUTO, LayoutKind.SPLIT, LayoutKind.SVD)
"""The families that have the truncated SVD among their candidates."""


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    steps = torch.arange(20.0)
    return {
        "random": draw(12, 16),
        "wide": draw(5, 72),
        "tall": draw(36, 5),
        "primes": draw(11, 23),
        "orthogonal": torch.linalg.qr(draw(12, 12))[0],
        "identity": torch.eye(12),
        "kronecker": torch.kron(draw(3, 4), draw(4, 5)),
        "two kroneckers": torch.kron(draw(3, 4), draw(4, 5)) + torch.kron(draw(3, 4), draw(4, 5)),
        "low rank": draw(12, 2) @ draw(2, 21),
        "smooth": torch.exp(-(steps[:16, None] - steps).abs() / 5),
        "one row": draw(1, 24),
        "one column": draw(24, 1),
        "one number": draw(1, 1),
        "small": draw(2, 3),
        "ones": torch.ones(8, 15),
        "zero": torch.zeros(8, 15),
    }


NAMES = list(matrices())
SOME = ("primes", "kronecker", "smooth", "one row", "zero")
CASES = [(name, LayoutKind.AUTO, weighted) for name in NAMES for weighted in (False, True)]
CASES += [
    (name, kind, weighted) for name in SOME for kind, weighted in ((LayoutKind.SPLIT, True), (LayoutKind.SVD, False))
]


def metric_of(matrix: Tensor, weighted: bool) -> Metric:
    return observed(*matrix.shape, samples=50) if weighted else Metric(*matrix.shape)


@cache
def case(name: str, kind: LayoutKind, weighted: bool) -> HTSearch:
    matrix = matrices()[name]
    gates = 4 if matrix.shape[0] % 4 == 0 else 1
    metric = metric_of(matrix, weighted)
    return search_of(matrix, metric, max_parameters=matrix.numel(), gates=gates, layout=kind)


def weighted_matrix(search: HTSearch) -> Tensor:
    g, a = roots_of(search.metric)
    return g @ search.matrix.dense().double() @ a


def budgets(search: HTSearch) -> list[int]:
    """Exactly what an SVD of some rank takes, one number less, and others between."""
    m, n = search.matrix.shape
    exact = [r * (m + n) for r in range(1, min(m, n)) if r * (m + n) < m * n]
    fractions = [int(search.smallest + f * (m * n - search.smallest)) for f in (0, 0.05, 0.15, 0.4, 0.8, 1)]
    return sorted({b for b in [*exact, *(b - 1 for b in exact), *fractions] if b >= search.smallest})


def check(search: HTSearch, choice: Choice, budget: int) -> None:
    """The numbers are within the budget, and the error is the one of the definition."""
    assert choice.parameters <= budget
    if choice.matrix is None:
        assert (choice.parameters, choice.error) == (search.matrix.numel(), 0.0)
        return
    stored = sum(core.numel() for core in choice.matrix.tensor.stored)
    assert stored == choice.matrix.parameters == choice.parameters
    error = weighted_error(search.metric, search.matrix.dense() - choice.matrix.dense())
    assert choice.error == pytest.approx(error, rel=1e-4, abs=1e-9 * search.total)


@pytest.mark.parametrize(("name", "kind", "weighted"), CASES)
def test_never_worse_than_the_truncated_svd(name: str, kind: LayoutKind, weighted: bool) -> None:
    search = case(name, kind, weighted)
    m, n = search.matrix.shape
    target = weighted_matrix(search)
    assert search.total == pytest.approx(float(target.square().sum()), rel=1e-6)
    for budget in budgets(search):
        choice = search.best(budget)
        check(search, choice, budget)
        assert choice.error <= svd_error(target, budget // (m + n)) * (1 + 1e-6) + 1e-9 * search.total


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", [*SOME, "small"])
def test_a_polished_choice_is_no_worse(name: str, weighted: bool) -> None:
    search = case(name, LayoutKind.AUTO, weighted)
    for budget in budgets(search)[::3]:
        choice, polished = search.best(budget), search.best(budget, polish=True)
        check(search, polished, budget)
        assert polished.error <= choice.error * (1 + 1e-9)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", NAMES)
def test_paired_layouts_keep_the_budget(name: str, weighted: bool) -> None:
    search = case(name, LayoutKind.PAIRED, weighted)
    for budget in budgets(search):
        choice = search.best(budget)
        check(search, choice, budget)
        assert choice.matrix is None or choice.matrix.layout.kind is LayoutKind.PAIRED


@pytest.mark.parametrize("kind", LayoutKind)
@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_is_what_it_says(name: str, kind: LayoutKind) -> None:
    search = case(name, kind, False)
    assert search.best(search.smallest - 1) is None
    assert search.best(search.smallest).parameters == search.smallest


@pytest.mark.parametrize("cols", [60, 72, 128])
def test_the_smallest_does_not_depend_on_the_budget(cols: int) -> None:
    matrix, found = torch.randn(8, cols), set()
    for budget in (1, 20, 50, 100, 300):
        for columns in (None, Columns(cols - 5, 5)):
            search = search_of(matrix, Metric(8, cols), max_parameters=budget, columns=columns, gates=4)
            found.add((columns, search.smallest))
    assert len(found) == 2


# ---- structure ------------------------------------------------------------------------------------------


def test_a_kronecker_product_is_found() -> None:
    """12 x 20 = (3 x 4) x (4 x 5): a matrix of full rank 12, and a layout of 32 numbers."""
    matrix = matrices()["kronecker"]
    search = search_of(matrix, Metric(12, 20), max_parameters=100, layout=LayoutKind.PAIRED)
    exact = search.best(32)
    assert exact.parameters == 32
    assert relative(exact.error, search.total) < 1e-6
    svd = case("kronecker", LayoutKind.SVD, False).best(32)
    assert relative(svd.error, search.total) > 0.6


def test_folded_halves_beat_the_svd() -> None:
    """Rows and columns that are Kronecker products of vectors, as smooth filters are: folding saves most of them."""
    generator = torch.Generator().manual_seed(0)

    def side(*modes: int) -> Tensor:
        parts = [torch.randn(mode, 3, generator=generator) for mode in modes]
        product = parts[0]
        for part in parts[1:]:
            product = (product[:, None] * part).reshape(-1, 3)
        return product

    matrix = side(8, 8) @ side(10, 12).T
    search = search_of(matrix, Metric(64, 120), max_parameters=200)
    choice = search.best(200, polish=True)
    assert choice.parameters <= 200
    assert choice.matrix.layout.kind is LayoutKind.SPLIT
    assert choice.error < 1e-6 * search.total
    assert svd_error(matrix, 200 // 184) > 0.2 * search.total


def test_what_the_truncated_svd_bounds_is_not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank that the truncated SVD affords, too, folded candidates cannot lose less: higher ranks are tried."""
    made: list[tuple[bool, int, int]] = []
    own = SplitCandidate.truncate

    def truncate(candidate: SplitCandidate, ranks: tuple[int, ...]) -> HTMatrix:
        root = candidate.layout.tree.root.children or (0, 0)
        matrix = own(candidate, ranks)
        made.append((candidate.layout.kind is LayoutKind.SVD, ranks[root[0]], matrix.parameters))
        return matrix

    monkeypatch.setattr(SplitCandidate, "truncate", truncate)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, 64, generator=generator)
    search_of(w, observed(48, 64), max_parameters=2500).ladder()
    folded = [(rank, numbers) for is_svd, rank, numbers in made if not is_svd]
    assert any(is_svd for is_svd, _, _ in made)
    assert folded
    assert all(numbers < rank * (48 + 64) for rank, numbers in folded)


def kroneckers() -> Tensor:
    """(48, 64), three Kronecker products and noise: what is folded loses less than a truncated SVD."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 6, 8, generator=generator), torch.randn(3, 8, 8, generator=generator)
    products = torch.stack([torch.kron(a, b) for a, b in zip(*factors, strict=True)]).sum(0)
    return products + 0.1 * torch.randn(48, 64, generator=generator)


def test_a_choice_is_refined_once_however_many_ways_lead_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refined: list[tuple[int, int]] = []
    started = []

    def refine(start: HTMatrix, target: WeightedMatrix, split: RootSplit | None = None, *, iterations: int) -> HTMatrix:
        started.append(start)  # kept, so that no other is at its place
        refined.append((id(start), iterations))
        return refine_cores(start, target, split, iterations=iterations)

    monkeypatch.setattr(ht_search, "refine_cores", refine)
    search_of(kroneckers(), observed(48, 64), max_parameters=150).best(150, polish=True)
    assert len(refined) == len(set(refined)) > 1


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e12])
def test_errors_that_float32_tells_are_those_of_float64(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured to choose by; where the scale of the data leaves float32's range, in float64."""
    asked: list[tuple[torch.dtype, float, float]] = []
    own = RootSplit.error_of

    def error_of(split: RootSplit, rows: Tensor, cols: Tensor) -> Tensor:
        found = own(split, rows, cols)
        asked.append(
            (rows.dtype, float(found.detach()), float(own(split, rows.detach().double(), cols.detach().double())))
        )
        return found

    monkeypatch.setattr(RootSplit, "error_of", error_of)
    search = search_of(scale * kroneckers().double(), observed(48, 64), max_parameters=150)
    search.best(150, polish=True)
    assert {dtype for dtype, _, _ in asked} == {torch.float32 if scale == 1.0 else torch.float64}
    assert all(exact > 1e-3 * search.total for _, _, exact in asked)
    assert all(found == pytest.approx(exact, rel=1e-3) for _, found, exact in asked)


def test_more_budget_is_never_worse_along_the_ladder() -> None:
    for name in ("random", "smooth", "two kroneckers"):
        for weighted in (False, True):
            search = case(name, LayoutKind.AUTO, weighted)
            # Until all errors are measured ones.
            rungs = search.ladder()
            while better := next((b for c in rungs.choices if (b := rungs.improved(c)) is not None), None):
                rungs = better
            ladder = rungs.choices
            assert [c for choice in ladder for c in rungs.neighbours(choice)].count(ladder[0]) == 1
            for a, b in pairwise(ladder):
                assert a.parameters < b.parameters
                assert a.error > b.error
            for choice in ladder:
                check(search, choice, choice.parameters)
            assert ladder[0].parameters == search.smallest
            assert ladder[-1].error == 0.0


def test_a_cap_on_the_numbers_costs_little_below_it() -> None:
    """A search that knows its budget beforehand cuts its decompositions off, and loses little by it."""
    matrix = matrices()["smooth"]
    free = case("smooth", LayoutKind.AUTO, False)
    for budget in (40, 80, 150):
        capped = search_of(matrix, Metric(*matrix.shape), max_parameters=budget, gates=4)
        errors = [search.best(budget, polish=True).error for search in (capped, free)]
        assert errors[0] <= 1.25 * errors[1]


def test_the_columns_may_have_a_rest() -> None:
    matrix = torch.cat([matrices()["smooth"], torch.randn(16, 7)], dim=1)
    search = search_of(matrix, Metric(16, 27), max_parameters=200, columns=Columns(20, 7), gates=4)
    assert any(form.layout.col_modes.count(1) < len(form.layout.col_modes) - 1 for form in search.candidates)
    for budget in (60, 120, 200):
        check(search, search.best(budget), budget)


# ---- to an error ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "weighted"), crossed([*CASES, *((name, LayoutKind.PAIRED, True) for name in SOME)], 1)
)
def test_an_error_is_kept_and_the_svd_never_cheaper(name: str, kind: LayoutKind, weighted: bool) -> None:
    search = case(name, kind, weighted)
    m, n = search.matrix.shape
    target = weighted_matrix(search)
    for rtol in (0.7, 0.3, 0.05, 1e-3):
        choice = search.cheapest(rtol)
        check(search, choice, m * n)
        if choice.matrix is not None:
            stored = HTMatrix(choice.matrix.layout, choice.matrix.tensor.map(lambda core: core.float()))
            error = weighted_error(search.metric, search.matrix.dense() - stored.dense())
            assert error <= rtol**2 * search.total * (1 + 1e-5) + 1e-12
        if kind in WITH_SVD:
            # With a hair of room for float32, in which the error is measured.
            limit = rtol**2 * float(target.square().sum()) * (1 - 1e-4)
            rank = next(r for r in range(1, min(m, n) + 1) if svd_error(target, r) <= max(limit, 0.0) + 1e-12)
            assert choice.parameters <= min(rank * (m + n), m * n)


@pytest.mark.parametrize(("name", "weighted"), crossed(list(product(NAMES, [False, True])), 1))
def test_a_larger_error_never_needs_more_numbers(name: str, weighted: bool) -> None:
    search = case(name, LayoutKind.AUTO, weighted)
    numbers = [search.cheapest(rtol).parameters for rtol in (0.7, 0.5, 0.3, 0.1, 0.05, 1e-2, 1e-3)]
    assert numbers == sorted(numbers)


def test_no_error_keeps_the_matrix_dense() -> None:
    search = case("random", LayoutKind.AUTO, False)
    assert search.cheapest(0.0).matrix is None
    assert search.best(10**9).matrix is None
    assert search.best(10**9).error == 0.0


# ---- small things ---------------------------------------------------------------------------------------


def test_the_matrix_and_the_random_state_are_left_alone() -> None:
    matrix = matrices()["random"].requires_grad_()
    before, state = matrix.detach().clone(), torch.get_rng_state()
    search = search_of(matrix, metric_of(matrix, True), max_parameters=300)
    search.best(300, polish=True)
    search.ladder()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(matrix, before)
    assert matrix.grad is None


def test_front_keeps_what_nothing_beats() -> None:
    choices = [Choice(p, e, None) for p, e in ((3, 1.0), (1, 5.0), (2, 5.0), (2, 4.0), (4, 1.0), (5, 0.0))]
    assert [(c.parameters, c.error) for c in front(choices)] == [(1, 5.0), (2, 4.0), (3, 1.0), (5, 0.0)]


def test_relative() -> None:
    assert relative(4.0, 16.0) == 0.5
    assert relative(0.0, 0.0) == 0.0

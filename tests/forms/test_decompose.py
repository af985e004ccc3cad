"""The root's split is the best there is in the metric; every form is exact at full rank and keeps its bounds."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    attainable_ranks,
    distance,
    observed,
    roots_of,
    squared_tail,
    svd_error,
    weighted_error,
)
from torch import Tensor

from htcompress.forms.ht import HTMatrix
from htcompress.forms.ht_decompose import Half, RootSplit, Side, SplitCandidate, WholeCandidate, rank_cap
from htcompress.forms.refine import refine_cores
from htcompress.matrix import Layout, Metric
from htcompress.matrix import weighted as target
from htcompress.matrix.inputs import Inputs
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.tensor import parameter_count, pieces

ROWS, COLS = 12, 18


def matrix_of(rows: int = ROWS, cols: int = COLS) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def metrics(rows: int = ROWS, cols: int = COLS) -> dict[str, Metric]:
    full = observed(rows, cols)
    return {
        "plain": Metric(rows, cols),
        "inputs": Metric(rows, cols, inputs=full.inputs),
        "gradients": Metric(rows, cols, gradients=full.gradients),
        "diagonal": Metric(rows, cols, gradients=full.gradients.diagonal().clone(), inputs=full.inputs),
        "both": full,
        "few samples": observed(rows, cols, samples=5),
        "singular gradients": Metric(rows, cols, gradients=torch.ones(rows, rows), inputs=full.inputs),
    }


NAMES = list(metrics())


# ---- the root's split -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 18), (18, 12), (1, 9), (9, 1), (13, 13)])
@pytest.mark.parametrize("name", NAMES)
def test_the_split_is_the_optimum_of_every_rank(name: str, shape: tuple[int, int]) -> None:
    """No matrix of rank r comes nearer than the SVD of G^(1/2) W A^(1/2), and this one comes as near."""
    metric, matrix = metrics(*shape)[name], matrix_of(*shape)
    split = RootSplit.of(WeightedMatrix.of(matrix, metric))
    g, a = roots_of(metric)
    weighted = g @ matrix @ a
    values, total = torch.linalg.svdvals(weighted), float(weighted.square().sum())
    assert float((split.values - values).abs().max()) < 1e-7 * float(values[0])
    assert split.total == pytest.approx(total, rel=1e-9)
    for rank in range(min(shape) + 1):
        product = split.left[:, :rank] @ split.right[:, :rank].T
        assert weighted_error(metric, matrix - product) == pytest.approx(
            svd_error(weighted, rank), rel=1e-6, abs=1e-12 * total
        )


@pytest.mark.parametrize("name", NAMES)
def test_what_the_cap_cuts_off_is_counted(name: str) -> None:
    metric, matrix = metrics()[name], matrix_of()
    whole, part = (
        RootSplit.of(WeightedMatrix.of(matrix, metric)),
        RootSplit.of(WeightedMatrix.of(matrix, metric), cap=4),
    )
    assert part.left.shape == (ROWS, 4)
    assert part.right.shape == (COLS, 4)
    assert part.lost == pytest.approx(float(whole.values[4:].square().sum()), rel=1e-9, abs=1e-12 * whole.total)
    assert part.total == pytest.approx(whole.total, rel=1e-12)


@pytest.mark.parametrize("name", ["plain", "both"])
def test_many_rows_go_by_subspace_iteration(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Beyond the Gram limit: nearly the optimum, and nothing of the global random state."""
    metric, matrix = metrics(120, 130)[name], matrix_of(120, 130)
    matrix = matrix * 0.9 ** torch.arange(130)
    exact = RootSplit.of(WeightedMatrix.of(matrix, metric), cap=10)
    monkeypatch.setattr(target, "GRAM_ROWS", 50)
    state = torch.get_rng_state()
    found = RootSplit.of(WeightedMatrix.of(matrix, metric), cap=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.total == pytest.approx(exact.total, rel=1e-9)
    error = weighted_error(metric, matrix - found.left @ found.right.T)
    assert error <= weighted_error(metric, matrix - exact.left @ exact.right.T) * 1.01
    assert error == pytest.approx(found.lost, rel=1e-6)


# ---- forms ----------------------------------------------------------------------------------------------


def split_form(matrix: Tensor, metric: Metric, rows: tuple[int, ...], cols: tuple[int, ...]) -> SplitCandidate:
    split = RootSplit.of(WeightedMatrix.of(matrix, metric))
    return SplitCandidate(split, Half.of(split, Side.ROWS, rows), Half.of(split, Side.COLS, cols))


FOLDINGS = [((12,), (18,)), ((3, 4), (18,)), ((12,), (3, 6)), ((4, 3), (2, 3, 3)), ((2, 3, 2), (5, 4)), ((5, 3), (19,))]


@pytest.mark.parametrize("foldings", FOLDINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_split_form_is_exact_at_full_rank(name: str, foldings: tuple[tuple[int, ...], ...]) -> None:
    matrix = matrix_of()
    form = split_form(matrix, metrics()[name], *foldings)
    stored = form.truncate(form.model.full)
    assert distance(stored.dense(), matrix) < 1e-7
    assert stored.layout == Layout.split(*foldings, rows=ROWS, cols=COLS)
    assert stored.parameters == form.model.parameters(form.model.full)


@pytest.mark.parametrize("foldings", [*FOLDINGS, ((1, 3, 4), (18, 1, 1))], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_paired_form_is_exact_at_full_rank(name: str, foldings: tuple[tuple[int, ...], ...]) -> None:
    matrix, (rows, cols) = matrix_of(), foldings
    count = min(len(rows), len(cols))
    layout = Layout.paired((ROWS + 1, *rows[1:])[:count], (COLS, *cols[1:])[:count], rows=ROWS, cols=COLS)
    form = WholeCandidate.of(WeightedMatrix.of(matrix, metrics()[name]), layout, cap=None)
    stored = form.truncate([r.numel() for r in form.spectra])
    assert distance(stored.dense(), matrix) < 1e-9
    assert stored.parameters == form.model.parameters(form.model.full)


@pytest.mark.parametrize(("rows", "cols"), [((3, 4), (6, 3)), ((6, 3), (4, 3))], ids=["wide", "tall"])
def test_without_data_a_split_form_keeps_its_bound(rows: tuple[int, ...], cols: tuple[int, ...]) -> None:
    """The plain error of every choice of ranks is at most the sum of the squared tails."""
    shape = rows[0] * rows[1], cols[0] * cols[1]
    matrix = matrix_of(*shape)
    form = split_form(matrix, Metric(*shape), rows, cols)
    tree, shape = form.layout.tree, form.layout.shape
    choices = [ranks for ranks in attainable_ranks(tree, shape) if max(ranks) <= 12][::19]
    assert len(choices) > 20
    for ranks in choices:
        stored = form.truncate(ranks)
        error = float((matrix - stored.dense()).square().sum())
        assert error <= squared_tail(form.spectra, tree, ranks) * (1 + 1e-9) + 1e-9
        assert error <= form.model.tail(ranks) * (1 + 1e-9) + 1e-9
        assert stored.parameters == parameter_count(tree, shape, ranks)
        assert stored.tensor.ranks == ranks


def test_without_data_a_paired_form_keeps_its_bound() -> None:
    matrix = matrix_of()
    for cap in (None, 4):
        form = WholeCandidate.of(
            WeightedMatrix.of(matrix, Metric(ROWS, COLS)), Layout.paired((3, 2, 2), (3, 3, 2)), cap=cap
        )
        for rank in (1, 2, 3, 4):
            ranks = [min(rank, full) for full in form.model.full]
            error = float((matrix - form.truncate(ranks).dense()).square().sum())
            assert error <= form.model.tail(ranks) * (1 + 1e-9)
            assert form.model.tail(ranks) >= form.decomposition.discarded


@pytest.mark.parametrize("name", NAMES)
def test_whole_halves_are_the_weighted_low_rank_optimum(name: str) -> None:
    metric, matrix = metrics()[name], matrix_of()
    form = split_form(matrix, metric, (ROWS,), (COLS,))
    g, a = roots_of(metric)
    for rank in (1, 3, 7):
        stored = form.truncate((rank, rank, 1))
        assert (stored.rank, stored.parameters) == (rank, rank * (ROWS + COLS))
        best = svd_error(g @ matrix @ a, rank)
        assert weighted_error(metric, matrix - stored.dense()) == pytest.approx(best, rel=1e-6)
        assert form.model.tail((rank, rank, 1)) == pytest.approx(best, rel=1e-6)


def test_a_metric_of_the_same_structure_is_used_exactly() -> None:
    """Where G is a Kronecker product over the modes, so are the bounds of a row half true again."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4 * n, n, generator=generator, dtype=torch.float64) for n in (3, 4)]
    gradients = torch.kron(*[x.T @ x / len(x) for x in parts])
    metric, matrix = Metric(ROWS, COLS, gradients=gradients), matrix_of()
    form = split_form(matrix, metric, (3, 4), (COLS,))
    for ranks in ((2, 3, 5, 5, 1), (1, 4, 4, 4, 1), (3, 2, 3, 3, 1)):
        error = weighted_error(metric, matrix - form.truncate(ranks).dense())
        assert error <= form.model.tail(ranks) * 1.001
    # And a blind decomposition is worse in this metric.
    blind = split_form(matrix, Metric(ROWS, COLS), (3, 4), (COLS,))
    errors = [weighted_error(metric, matrix - f.truncate((2, 3, 3, 3, 1)).dense()) for f in (form, blind)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["plain", "both"])
@pytest.mark.parametrize("kind", ["zero", "ones", "rank two", "kronecker"])
def test_ranks_that_a_matrix_does_not_have_cost_what_was_counted(kind: str, name: str) -> None:
    """Fewer directions than asked for: still exact where it should be, and never more numbers than counted."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrix = {
        "zero": torch.zeros(ROWS, COLS, dtype=torch.float64),
        "ones": torch.ones(ROWS, COLS, dtype=torch.float64),
        "rank two": draw(ROWS, 2) @ draw(2, COLS),
        "kronecker": torch.kron(draw(3, 6), draw(4, 3)),
    }[kind]
    form = split_form(matrix, metrics()[name], (3, 4), (6, 3))
    for wanted in (form.model.full, (2, 3, 4, 4, 3, 4, 1), (3, 4, 5, 6, 3, 5, 1), (1,) * 7):
        ranks = [min(rank, full) for rank, full in zip(wanted, form.model.full, strict=True)]
        stored = form.truncate(ranks)
        assert stored.parameters <= form.model.parameters(ranks)
        assert stored.dense().isfinite().all()
    assert distance(form.truncate(form.model.full).dense(), matrix) < 1e-7


def test_a_form_leaves_the_matrix_and_the_random_state_alone() -> None:
    matrix, state = matrix_of(), torch.get_rng_state()
    before = matrix.clone()
    form = split_form(matrix, metrics()["both"], (3, 4), (6, 3))
    form.truncate((2, 3, 4, 4, 3, 4, 1)).tensor.map(lambda core: core.zero_())
    assert torch.equal(matrix, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("rows", "cols"), [(64, 16), (40, 39), (16, 64), (30, 30)])
@pytest.mark.parametrize("samples", [5, 200])
def test_a_split_is_the_svd_in_the_metric(rows: int, cols: int, samples: int) -> None:
    """By whichever Gram matrix it was found."""
    generator = torch.Generator().manual_seed(rows)
    matrix, noise, inputs = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, cols), (rows, 2 * rows), (samples, cols))
    )
    metric = Metric(rows, cols, noise @ noise.T / rows, Inputs.of(inputs * torch.linspace(0.1, 3, cols)))
    target = WeightedMatrix.of(matrix, metric)
    assert (target.inputs_root is None) == (cols >= rows)
    split = RootSplit.of(target)
    values, vectors = torch.linalg.eigh(metric.input_moment)
    root = vectors * values.sqrt() @ vectors.T
    weighed = metric.row_root.apply(matrix) @ root
    wanted = torch.linalg.svdvals(weighed)
    assert torch.allclose(split.values, wanted, rtol=1e-8)
    assert target.total == pytest.approx(float(wanted.square().sum()), rel=1e-9)
    assert torch.allclose(split.left @ split.right.T, matrix, atol=1e-8)
    for rank in (1, 7, min(rows, cols) - 1):
        found = split.left[:, :rank] @ split.right[:, :rank].T
        error = (metric.row_root.apply(matrix - found) @ root).square().sum()
        assert split.beyond(rank) == pytest.approx(float(error), rel=1e-7)


def test_the_cap_on_ranks_is_no_loss() -> None:
    """A form that stores so few numbers has no higher rank anywhere."""
    for budget in (1, 30, 100, 500):
        cap = rank_cap(budget, 1000, 1000)
        layout = Layout.split((3, 4), (6, 3))
        for ranks in attainable_ranks(layout.tree, layout.shape):
            if parameter_count(layout.tree, layout.shape, ranks) <= budget:
                assert max(ranks) <= cap
    assert rank_cap(10**6, 7, 100) == 7


# ---- refinement -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["split", "paired"])
@pytest.mark.parametrize("name", NAMES)
def test_refinement_lowers_the_error_in_the_metric(name: str, kind: str) -> None:
    metric, matrix = metrics()[name], matrix_of()
    if kind == "split":
        start = split_form(matrix, metric, (3, 4), (6, 3)).truncate((2, 3, 4, 4, 3, 4, 1))
    else:
        form = WholeCandidate.of(WeightedMatrix.of(matrix, metric), Layout.paired((3, 4), (6, 3)), cap=None)
        start = form.truncate((5, 5, 1))
    before = start.dense().clone()
    after = refine_cores(start, WeightedMatrix.of(matrix, metric))
    assert (after.layout, after.tensor.ranks, after.parameters) == (start.layout, start.tensor.ranks, start.parameters)
    errors = [weighted_error(metric, matrix - m.dense()) for m in (start, after)]
    assert errors[1] <= errors[0] * (1 + 1e-6)
    if kind == "split" or name in ("diagonal", "both", "few samples"):  # else HT-SVD is the optimum already
        assert errors[1] < 0.999 * errors[0]
    assert torch.equal(start.dense(), before)


def test_refinement_of_the_optimum_stays_there() -> None:
    metric, matrix = metrics()["both"], matrix_of()
    start = split_form(matrix, metric, (ROWS,), (COLS,)).truncate((4, 4, 1))
    after = refine_cores(start, WeightedMatrix.of(matrix, metric))
    g, a = roots_of(metric)
    assert weighted_error(metric, matrix - after.dense()) == pytest.approx(svd_error(g @ matrix @ a, 4), rel=1e-4)


def test_a_decomposition_of_large_halves_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, metric = matrix_of(), metrics()["both"]
    whole = split_form(matrix, metric, (3, 4), (6, 3)).truncate((2, 3, 4, 4, 3, 4, 1))
    monkeypatch.setattr(pieces, "CHUNK", 20)
    parts = split_form(matrix, metric, (3, 4), (6, 3)).truncate((2, 3, 4, 4, 3, 4, 1))
    assert isinstance(parts, HTMatrix)
    assert distance(parts.dense(), whole.dense()) < 1e-9

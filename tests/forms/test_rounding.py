"""Matrices on the grid: the quadratic of a core is the error's, and feedback is never worse than rounding plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import opt_einsum
import pytest
import torch
from searching import search_of
from torch import Tensor

from htcompress.forms.coded import CodedChoice, CodedSearch
from htcompress.forms.core_problem import Feedback, _sliced, core_problem
from htcompress.forms.dense import DenseMatrix
from htcompress.forms.dense_search import DenseLadder
from htcompress.forms.ht import HTMatrix
from htcompress.forms.rounding import rounded_plainly, rounded_with_feedback, spread
from htcompress.matrix import weighted
from htcompress.matrix.inputs import gather
from htcompress.matrix.layout import Layout
from htcompress.matrix.metric import Metric
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.vocabulary import INTEGER_BITS, Format

ROWS, COLS = 24, 30
LAYOUTS = [Layout.split((24,), (30,)), Layout.split((4, 6), (5, 6)), Layout.split((2, 3, 4), (31,), cols=30)]


def metric(samples: int = 400, *, centred: bool = False, gradients: str = "matrix") -> Metric:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, COLS, generator=generator) * torch.logspace(0, -1, COLS) + 0.2
    root = torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, ROWS)
    moment = {"matrix": root @ root.T, "diagonal": (root @ root.T).diagonal(), "none": None}[gradients]
    return Metric(ROWS, COLS, moment, gather([inputs]).select(0, centred=centred))


def matrix() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (ROWS, COLS))
    return left @ torch.diag(torch.logspace(0, -1, 12, dtype=torch.float64)) @ right.T


def rounded_ht(target: WeightedMatrix, layout: Layout) -> HTMatrix:
    found = spread(HTMatrix.from_dense(target.matrix.dense().double(), layout, max_rank=5))
    assert isinstance(found, HTMatrix)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.row_modes}x{layout.col_modes}")
@pytest.mark.parametrize("gradients", ["matrix", "diagonal", "none"])
@pytest.mark.parametrize("centred", [False, True])
def test_the_problem_of_a_core_is_the_error(layout: Layout, gradients: str, centred: bool) -> None:
    target = WeightedMatrix.of(matrix(), metric(centred=centred, gradients=gradients))
    found = rounded_ht(target, layout)
    for t, core in enumerate(found.cores):
        if not isinstance(core, Tensor):
            continue
        problem = core_problem(found, Feedback(target), t)

        def error(values: Tensor, t: int = t, core: Tensor = core) -> Tensor:
            cores = [values.reshape(core.shape) if k == t else c for k, c in enumerate(found.cores)]
            lost = target.matrix.dense().double() - found.with_cores(cores).dense()
            weighed = target.metric.row_root.apply(lost)
            return (weighed.T * target.metric.through(weighed.T)).sum()

        best = problem.best.reshape(-1).requires_grad_()
        (gradient,) = torch.autograd.grad(error(best), best)
        (before,) = torch.autograd.grad(error(start := core.reshape(-1).clone().requires_grad_()), start)
        assert gradient.norm() <= 1e-5 * before.norm() + 1e-8 * target.total
        # Numbers that stand for padding alone are held where they are, which the error does not ask for.
        padded = 31 in found.layout.col_modes
        if problem.cols is None and problem.rows is not None and not padded:
            curvature = torch.autograd.functional.hessian(error, best.detach()) / 2
            off = problem.rows.matrix - torch.diag(problem.rows.matrix.diagonal())
            assert torch.allclose(off, curvature - torch.diag(curvature.diagonal()), atol=1e-6 * curvature.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.row_modes}x{layout.col_modes}")
@pytest.mark.parametrize("gradients", ["matrix", "diagonal", "none"])
def test_a_problem_is_the_same_by_parts(layout: Layout, gradients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = WeightedMatrix.of(matrix(), metric(gradients=gradients))
    found = rounded_ht(target, layout)
    stored = [t for t, core in enumerate(found.cores) if isinstance(core, Tensor)]
    wanted = [core_problem(found, Feedback(target), t) for t in stored]
    parts = 0

    def sliced(*given: Any) -> Any:
        nonlocal parts
        parts += 1
        return _sliced(*given)

    monkeypatch.setattr("htcompress.forms.core_problem._ON_THE_WAY", 100)
    monkeypatch.setattr("htcompress.forms.core_problem._sliced", sliced)
    for t, own in zip(stored, wanted, strict=True):
        other = core_problem(found, Feedback(target), t)
        assert torch.allclose(other.best, own.best, rtol=1e-6, atol=1e-6 * float(own.best.abs().max()))
        for a, b in ((other.rows, own.rows), (other.cols, own.cols)):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.allclose(a.matrix, b.matrix, atol=1e-9 * float(b.matrix.abs().max()))
    assert (parts > 0) == found.folds


@pytest.mark.parametrize("bits", INTEGER_BITS)
@pytest.mark.parametrize("samples", [12, 400])
def test_feedback_is_never_worse(bits: int, samples: int) -> None:
    target = WeightedMatrix.of(matrix(), metric(samples))
    dense = DenseMatrix(target.matrix.dense().double())
    for start in (dense, *(rounded_ht(target, layout) for layout in LAYOUTS)):
        plain, found = rounded_plainly(start, target, bits), rounded_with_feedback(start, Feedback(target), bits)
        assert found.error <= plain.error
        assert found.error == pytest.approx(target.error_of(found.matrix))
        # What is stored stands for what was measured.
        for core, codec, scales in zip(found.matrix.cores, found.codecs, found.scales, strict=True):
            if codec is not None and isinstance(core, Tensor):
                stored = codec.encode(core, scales)
                assert torch.equal(codec.decode(stored, tuple(core.shape)), core.float())


@pytest.mark.parametrize("bits", [3, 6])
def test_large_factors_are_rounded_in_float32(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(dtype: torch.dtype) -> list[float]:
        target = WeightedMatrix.of(matrix(), metric())
        starts = [rounded_ht(target, layout) for layout in LAYOUTS]
        factors = [target.factors_of(start) for start in starts]
        assert all(own is not None and own[1].dtype is dtype for own in factors)
        return [rounded_with_feedback(start, Feedback(target), bits).error / target.total for start in starts]

    wanted = errors(torch.float64)
    monkeypatch.setattr(weighted, "DOUBLED", 0)
    monkeypatch.setattr(weighted, "LARGE", 0)
    # Some numbers are rounded otherwise, since their least squares are damped more.
    assert errors(torch.float32) == pytest.approx(wanted, rel=0.01)


def test_spread_changes_nothing_but_the_cores() -> None:
    for layout in LAYOUTS:
        plain = HTMatrix.from_dense(matrix(), layout, max_rank=5)
        turned = spread(plain)
        assert torch.allclose(turned.dense(), plain.dense(), atol=1e-9)
        assert turned.parameters == plain.balance().parameters
        assert [isinstance(c, Tensor) for c in turned.cores] == [isinstance(c, Tensor) for c in plain.balance().cores]


@pytest.mark.parametrize("form", [Format.HT, Format.TT, Format.TR, Format.BT, Format.SVD])
def test_choices_in_bytes(form: Format) -> None:
    base = search_of(matrix().float(), metric(), form=form.value, max_parameters=500, gates=4)
    search = CodedSearch(base, INTEGER_BITS, width=4, dense=True)
    ladder = search.ladder()
    sizes = [choice.size for choice in ladder.choices]
    assert sizes == sorted(sizes)
    assert sizes[0] == search.smallest
    assert ladder.choices[-1].matrix is None
    for choice in list(ladder.choices)[:: max(1, len(sizes) // 6)]:
        made = search.exact(choice)
        assert made.size == choice.size
        if made.matrix is not None:
            assert made.size == stored_bytes(made.matrix.cores, made.codecs.values())
            assert made.parameters == sum(core.numel() for core in made.matrix.cores if isinstance(core, Tensor))
        better = search.grown(made, made.size + 40)
        assert better is None or better.size <= made.size + 40


@pytest.mark.parametrize("form", [Format.HT, Format.TT, Format.SVD])
def test_what_will_be_stored_is_rounded_in_several_bases(form: Format) -> None:
    base = search_of(matrix().float(), metric(), form=form.value, max_parameters=500, gates=4)
    search = CodedSearch(base, (4,), width=4, dense=True)
    better = 0
    for choice in search.ladder().choices:
        made = search.exact(choice)
        polished = search.polished(made)
        assert (polished.size, polished.parameters) == (made.size, made.parameters)
        assert polished.error <= made.error
        assert search.polished(made).error == polished.error
        if polished.error < made.error:
            better += 1
            assert polished.matrix is not None
            assert search.target.error_of(polished.matrix) == pytest.approx(polished.error)
    assert (better > 0) == (form is not Format.TT)


def test_truncated_svds_stay_beside_what_is_folded() -> None:
    search = search_of(matrix().float(), metric(), max_parameters=500, gates=4)
    ladder = search.ladder()
    every = [choice for choice in ladder.every if choice.matrix is not None]
    assert [c.parameters for c in every] == sorted(c.parameters for c in every)
    plain = [c for c in every if c.matrix is not None and not c.matrix.folds]
    assert plain
    assert len(plain) < len(every)
    assert {id(c.matrix) for c in ladder.choices} <= {id(c.matrix) for c in ladder.every}
    # What they lose is known: no gain of refinement is expected of them.
    assert all(c.error == pytest.approx(search.target.error_of(c.matrix), rel=1e-4) for c in plain if c.matrix)


def test_a_dense_matrix_that_does_not_fit_is_not_rounded() -> None:
    base = search_of(matrix().float(), metric(), max_parameters=500, gates=4)
    every = CodedSearch(base, INTEGER_BITS, width=4, dense=True)
    two_bits = every.bytes_of(base.dense, 2)
    some = CodedSearch(base, INTEGER_BITS, width=4, dense=True, most=two_bits)
    none = CodedSearch(base, INTEGER_BITS, width=4, dense=True, most=two_bits - 1)
    for search, expected in ((every, set(INTEGER_BITS)), (some, {2}), (none, set())):
        coded = [c for c in search.ladder().choices if isinstance(c, CodedChoice) and c.is_dense]
        assert {c.bits for c in coded} <= expected
        assert all(c.size <= search.most for c in coded)
    assert "_lost_by_dense" not in vars(none)


def stored_bytes(cores: Sequence[object], codecs) -> int:  # type: ignore[no-untyped-def]
    every = zip((c for c in cores if isinstance(c, Tensor)), codecs, strict=True)
    return sum(
        sum(part.numel() * part.element_size() for part in codec.encode(core, s).values()) for core, (codec, s) in every
    )


def test_what_refinement_leaves_behind_keeps_its_numbers() -> None:
    """A choice that another one beats once that was refined is still rounded as what it is."""
    base = search_of(matrix().float(), metric(), max_parameters=500, gates=4)
    ladder = CodedSearch(base, (4,), width=4, dense=False).ladder()
    choice = next(choice for choice in ladder.choices if choice.matrix is not None)
    left = replace(ladder, base=DenseLadder(base.dense)).improved(choice)
    assert left is not None
    (made,) = left.known.values()
    assert made.matrix is not None
    assert made.parameters == choice.parameters == made.matrix.parameters


@pytest.mark.parametrize("samples", [12, 400])
@pytest.mark.parametrize("centred", [False, True])
def test_the_moment_of_the_inputs(samples: int, centred: bool) -> None:
    own = metric(samples, centred=centred)
    identity = torch.eye(COLS, dtype=torch.float64)
    assert torch.allclose(own.input_moment, own.through(identity), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.row_modes}x{layout.col_modes}")
def test_a_diagonal_metric_is_never_written_out(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 8,192 rows of an LSTM of 2,048 it took more than 20 GB."""
    made = metric(gradients="diagonal")
    assert made.gradients is not None
    written = Metric(ROWS, COLS, torch.diag(made.gradients), made.inputs)
    contract = opt_einsum.contract
    found = rounded_ht(WeightedMatrix.of(matrix(), made), layout)
    for t, core in enumerate(found.cores):
        if isinstance(core, Tensor):
            second = core_problem(found, Feedback(WeightedMatrix.of(matrix(), written)), t)
            sizes: list[int] = []

            def seen(*operands: Any, into: list[int] = sizes, **options: Any) -> Any:
                into += [one.numel() for one in operands if isinstance(one, Tensor)]
                return contract(*operands, **options)

            with monkeypatch.context() as patch:
                patch.setattr(opt_einsum, "contract", seen)
                first = core_problem(found, Feedback(WeightedMatrix.of(matrix(), made)), t)
            assert ROWS**2 not in sizes
            pair = first, second
            assert torch.allclose(pair[0].best, pair[1].best, rtol=1e-6, atol=1e-8)
            for a, b in ((pair[0].rows, pair[1].rows), (pair[0].cols, pair[1].cols)):
                if a is not None and b is not None:
                    assert torch.allclose(a.matrix, b.matrix, rtol=1e-6, atol=1e-8 * float(b.matrix.abs().max()))

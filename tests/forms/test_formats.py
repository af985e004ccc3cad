"""Decomposing in the comparison formats: against tensorly, and against what the search promises."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import tensorly
import torch
from oracles import distance
from searching import search_of
from tensorly.decomposition import tensor_train

import htcompress
from htcompress.errors import RequestError
from htcompress.forms import BlockTerm, NetworkMatrix, TensorRing, TensorTrain
from htcompress.forms.form import Columns
from htcompress.forms.reduced import Reduced
from htcompress.matrix import Layout, Metric
from htcompress.matrix.inputs import Inputs
from htcompress.request import Goal
from htcompress.vocabulary import Format, LayoutKind

NETWORKS = [Format.TT, Format.TR, Format.BT]
LAYOUT = Layout.paired((4, 4, 4), (5, 4, 3))


def decaying(rows: int, cols: int) -> torch.Tensor:
    """A smooth function of two variables plus a little noise."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.linspace(0, 3, rows)[:, None], torch.linspace(0, 5, cols)[None]
    noise = torch.randn(rows, cols, generator=generator)
    return (torch.sin(a * b) + torch.exp(-a - b) + 0.02 * noise).double()


def test_a_train_is_as_good_as_tensorlys() -> None:
    """At the same ranks, on a tensor that is not reduced at all."""
    folded = LAYOUT.fold(decaying(64, 60))
    reduced = Reduced.of(folded)
    (structure,) = TensorTrain.within(LAYOUT, reduced, 400)
    assert isinstance(structure, TensorTrain)
    cores = structure.decompose(reduced)
    ours = LAYOUT.fold(NetworkMatrix(structure, tuple(cores)).dense())
    with tensorly.backend_context("pytorch"):
        theirs = tensor_train(folded, rank=[1, *structure.ranks[1:], 1]).to_tensor()
    assert 300 < structure.parameters <= 400
    assert distance(ours, folded) <= 1.001 * distance(theirs, folded)


FULL = {"tt": TensorTrain(LAYOUT, (1, 20, 12)), "tr": TensorRing(LAYOUT, (4, 5, 48)), "bt": BlockTerm(LAYOUT, (1, 20))}


@pytest.mark.parametrize("form", FULL)
def test_full_ranks_are_exact(form: str) -> None:
    folded = LAYOUT.fold(decaying(64, 60))
    matrix = NetworkMatrix(FULL[form], tuple(FULL[form].decompose(Reduced.of(folded))))
    assert distance(matrix.dense(), decaying(64, 60)) < 1e-12


def test_a_train_is_found_again() -> None:
    structure = TensorTrain(LAYOUT, (1, 5, 4))
    exact = NetworkMatrix(structure, tuple(torch.randn(s, dtype=torch.float64) for s in structure.shapes)).dense()
    again = structure.decompose(Reduced.of(LAYOUT.fold(exact)))
    assert distance(NetworkMatrix(structure, tuple(again)).dense(), exact) < 1e-12


@pytest.mark.parametrize("form", NETWORKS)
def test_a_search_keeps_its_budgets_and_measures_its_errors(form: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = decaying(64, 90)
    samples = torch.randn(200, 90, generator=generator).cumsum(1).double()
    moment = torch.randn(64, 64, generator=generator)
    search = search_of(
        matrix,
        Metric(64, 90, (moment @ moment.T).double(), Inputs.of(samples)),
        form=form,
        max_parameters=1500,
        gates=4,
        columns=Columns(74, 16),
    )
    errors = []
    for budget in (search.smallest, 500, 1500):
        choice = search.best(budget, polish=True)
        assert choice is not None
        assert isinstance(choice.matrix, NetworkMatrix)
        assert choice.parameters == choice.matrix.parameters <= budget
        assert choice.matrix.structure.format in (form, Format.TT)
        assert search.target.error_of(choice.matrix) == pytest.approx(choice.error, rel=1e-9)
        errors.append(choice.error / search.total)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05
    assert search.best(search.smallest - 1) is None
    assert search.best(matrix.numel()) == search.dense
    ladder = search.ladder().choices
    assert ladder[-1].matrix is None
    assert all(a.parameters < b.parameters and a.error > b.error for a, b in pairwise(ladder))


@pytest.mark.parametrize("form", NETWORKS)
def test_refinement_gains(form: Format) -> None:
    matrix = decaying(64, 90)
    samples = torch.randn(200, 90, generator=torch.Generator().manual_seed(0)).cumsum(1).double()
    search = search_of(matrix, Metric(64, 90, None, Inputs.of(samples)), form=form, max_parameters=800, gates=4)
    raw, refined = search.best(800), search.best(800, polish=True)
    assert raw is not None
    assert refined is not None
    assert refined.error < 0.98 * search.exact(raw).error


@pytest.mark.parametrize("form", NETWORKS)
def test_an_error_is_kept(form: Format) -> None:
    matrix = decaying(64, 90)
    search = search_of(matrix, Metric(64, 90), form=form, max_parameters=matrix.numel(), gates=4)
    choice = search.cheapest(0.2)
    assert choice.matrix is not None
    assert choice.parameters < matrix.numel()
    assert distance(choice.matrix.dense(), matrix) <= 0.2
    assert search.cheapest(0.0).matrix is None


KINDS = (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN)


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        pytest.param(form, kind, marks=[] if (i + j) % 3 == 0 else pytest.mark.full)
        for i, form in enumerate(Format)
        for j, kind in enumerate(KINDS)
    ],
)
def test_every_format_is_a_model_that_trains_and_is_saved(form: Format, kind: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = kind(40, 16, bidirectional=kind is torch.nn.GRU)
    inputs = [torch.randn(7, 3, 40) for _ in range(3)]
    before = sum(p.numel() for p in dense.parameters())
    # What only rounds is asked for a third of the bytes.
    rounds = form is Format.DENSE
    result = htcompress.compress(
        dense,
        budget=f"{4 * before // 3}B" if rounds else before // 3,
        calibration=inputs,
        training=inputs,
        finetuning=htcompress.FineTuning(steps=3),
        format=form,
    )
    if rounds:
        assert result.report.totals.bytes_after <= 4 * before // 3
    else:
        assert result.report.totals.parameters_after <= before // 3
    assert result.report.request["format"] == form
    layouts = {m.layout for layer in result.report.layers for m in layer.matrices if not m.kept_dense}
    expected = {Format.HT: {"split", "svd"}, Format.SVD: {"svd"}, Format.TR: {"tr", "tt"}}.get(form, {form.value})
    assert layouts
    assert layouts <= expected
    place = tmp_path / "out"
    htcompress.save(result, place)
    loaded = htcompress.load(place, kind(40, 16, bidirectional=kind is torch.nn.GRU))
    x = torch.randn(5, 2, 40)
    with torch.no_grad():
        assert distance(loaded(x)[0], result.model(x)[0]) < 1e-6
        for module in result.modules.values():
            for plan in ("materialise", "contract") if form in NETWORKS else ("materialise",):
                module.use_execution(plan)
                assert distance(module(x)[0], loaded(x)[0]) < 1e-5


def test_a_format_with_a_layout_is_refused() -> None:
    with pytest.raises(RequestError, match="one family of layouts"):
        Goal(budget=10, format=Format.TT, layout=LayoutKind.SPLIT)

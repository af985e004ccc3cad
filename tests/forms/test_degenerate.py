"""Inputs and gradients of any rank and scale: sizes from 1, nothing varies, one direction, heavy tails, 1e-30, 1e30."""

from __future__ import annotations

import pytest
import torch
from crossing import some
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples, weighted_error
from searching import search_of
from torch import Tensor

from htcompress.forms.form import Columns, MatrixSearch
from htcompress.matrix import Metric
from htcompress.matrix import weighted as target_module
from htcompress.matrix.blocks import Block, Blocks
from htcompress.matrix.inputs import Inputs, MomentInputs, gather
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.vocabulary import Format, LayoutKind

KINDS = ("normal", "zero", "constant", "rank one", "twice", "one column", "heavy", "far off")
SCALES = (1.0, 1e-30, 1e30)


def data(kind: str, samples: int, size: int, scale: float = 1.0, *, seed: int = 0) -> Tensor:
    """Samples (samples, size) in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, size, generator=generator)
    if kind == "zero":
        x = torch.zeros(samples, size)
    elif kind == "constant":
        x = x[:1].expand(samples, size)
    elif kind == "rank one":
        x = x[:, :1] * x[:1]
    elif kind == "twice":
        x = x[torch.arange(samples) // 2]
    elif kind == "one column":
        x = x * (torch.arange(size) == size // 2)
    elif kind == "heavy":
        x = x.sign() * x.abs() ** 12
    elif kind == "far off":
        x = 1e3 + 1e-2 * x
    return scale * x.contiguous()


def second_moment(x: Tensor, *, centred: bool) -> Tensor:
    x = x.double()
    x = x - x.mean(0) if centred else x
    return x.T @ x


sizes = st.integers(1, 9)
drawn = (st.sampled_from(KINDS), st.sampled_from(SCALES), st.sampled_from([1, 2, 5, 40]), sizes, sizes, st.booleans())


@examples(120)
@given(*drawn)
def test_inputs(kind: str, scale: float, samples: int, first: int, second: int, centred: bool) -> None:
    kinds = [data(kind, samples, first, scale), torch.tanh(data("normal", samples, second, seed=1))]
    inputs = gather(kinds)
    for chosen in ((0,), (1,), (0, 1)):
        x = torch.cat([kinds[k] for k in chosen], dim=1)
        moment, found = second_moment(x, centred=centred), inputs.select(*chosen, centred=centred)
        # What is left of a constant by rounding counts as nothing: float64's share of the mean's square.
        noise = 1e-12 * float(second_moment(x, centred=False).trace())
        scale_of = float(moment.trace())
        assert abs(found.trace - scale_of) <= 1e-6 * scale_of + noise
        assert abs(found.square**0.5 - float(moment.norm())) <= 1e-6 * scale_of + noise
        w = torch.randn(3, x.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        matrix = Blocks([Block(part) for part in w.split([kinds[k].shape[1] for k in chosen], dim=1)])
        expected, allowed = w @ moment @ w.T, (1e-6 * scale_of + noise) * float(w.square().sum())
        outputs = found.outputs(matrix)
        for gram in (found.output_gram(matrix), outputs @ outputs.T, w @ found.through(w.T)):
            assert float((gram - expected).norm()) <= allowed
        assert abs(found.squared(matrix.chunks()) - float(expected.trace())) <= allowed
        mode = found.mode_moment(1, x.shape[1], 1)
        assert float((mode - moment).norm()) <= 1e-5 * scale_of + noise


def searches(matrix: Tensor, metric: Metric) -> list[MatrixSearch]:
    gates = 4 if matrix.shape[0] % 4 == 0 else 1
    most, columns = matrix.numel(), Columns(matrix.shape[1])
    found: list[MatrixSearch] = [
        search_of(matrix, metric, max_parameters=most, gates=gates, layout=kind, columns=columns) for kind in LayoutKind
    ]
    forms = (Format.TT, Format.TR, Format.BT)
    return found + [search_of(matrix, metric, form=form, max_parameters=most, gates=gates) for form in forms]


@examples(60)
@given(*drawn, st.sampled_from(["normal", "zero", "rank one", "one column"]))
def test_searches(kind: str, scale: float, samples: int, hidden: int, cols: int, centred: bool, deltas: str) -> None:
    rows = 4 * hidden if samples > 2 else hidden
    gradients = second_moment(data(deltas, 30, rows, seed=3), centred=False) / 30
    inputs = Inputs.of(data(kind, samples, cols, scale)).select(0, centred=centred)
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(4)) / cols**0.5
    metric = Metric(rows, cols, gradients, inputs)
    inputs.given = data(kind, samples, cols, scale).double()  # what the oracle weighs with
    if centred:
        inputs.given = inputs.given - inputs.given.mean(0)
    for search in searches(matrix, metric):
        rungs = search.ladder().choices
        assert rungs[-1].matrix is None or rungs[-1].error <= 1e-12 * search.total
        for choice in [*rungs, search.best(rows * cols, polish=True), search.cheapest(0.3)]:
            assert choice is not None
            assert choice.parameters <= rows * cols
            if choice.matrix is None:
                continue
            exact = search.exact(choice).error
            oracle = metric if gradients.any() else Metric(rows, cols, None, inputs)
            lost = matrix.double() - choice.matrix.dense().double()
            assert exact == pytest.approx(weighted_error(oracle, lost), rel=1e-4, abs=1e-9 * search.total)
        kept = search.cheapest(0.3)
        assert kept.matrix is None or search.exact(kept).error <= 0.3**2 * search.total * (1 + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_read_inputs_of_low_rank(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where no Gram matrix of the outputs is formed, the inputs' moment need not have full rank."""
    rows, cols = 48, 12
    gathered = gather([data(kind, 70, cols)])
    assert isinstance(gathered, MomentInputs)
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(4))
    wanted = search_of(matrix, Metric(rows, cols, inputs=gathered.select(0)), max_parameters=200, layout=LayoutKind.SVD)
    small = wanted.best(200)
    monkeypatch.setattr(target_module, "GRAM_ROWS", 10)
    search = search_of(matrix, Metric(rows, cols, inputs=gathered.select(0)), max_parameters=200, layout=LayoutKind.SVD)
    assert search.target.gram is None
    found = search.best(200)
    assert small is not None
    assert found is not None
    assert found.error == pytest.approx(small.error, rel=1e-6, abs=1e-9 * search.total)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_large_matrices_at_scales_beyond_float32(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """As if every matrix were a large one, which float32 would do for: the choice is that of scale one."""
    for name in ("blocks", "weighted", "inputs"):
        monkeypatch.setattr(f"htcompress.matrix.{name}.DOUBLED", 0)
    matrix = torch.randn(24, 30, generator=torch.Generator().manual_seed(4))
    for samples in (9, 90):
        found = []
        for factor in (1.0, scale):
            metric = Metric(24, 30, inputs=Inputs.of(data("normal", samples, 30, factor)))
            search = search_of(matrix, metric, max_parameters=400, gates=4)
            best = search.best(300, polish=True)
            assert best is not None
            found.append((best.error / search.total, WeightedMatrix.of(matrix, metric).total / factor**2))
        assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("default", some([torch.float64, "meta"], torch.float64), ids=str)
def test_the_defaults_of_torch_change_nothing(default: torch.dtype | str) -> None:
    def errors() -> list[float]:
        found = []
        for samples in (9, 90):
            generator = torch.Generator(device="cpu").manual_seed(4)
            options = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
            matrix, x = torch.randn(12, 20, **options), torch.randn(samples, 18, **options)
            metric = Metric(12, 20, inputs=gather([x]).select(0, constants=2))
            for search in searches(matrix, metric):
                choices = [search.best(120, polish=True), search.cheapest(0.3), *search.ladder().choices]
                found += [choice.error for choice in choices if choice is not None]
                cores = [core for c in choices if c and c.matrix for core in c.matrix.cores]
                dtypes = {core.dtype for core in cores if isinstance(core, Tensor)}
                assert dtypes == {torch.float64}
        return found

    plain = errors()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        assert errors() == plain
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (1, 4), (1, 1), (3, 1)])
def test_what_nothing_makes_smaller_stays_dense(rows: int, cols: int) -> None:
    """The recurrent matrix of a layer of one unit: its ladder is the matrix itself."""
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(4))
    for inputs in (None, Inputs.of(data("normal", 24, cols))):
        for search in searches(matrix, Metric(rows, cols, inputs=inputs)):
            ladder = search.ladder().choices
            assert ladder[-1].error == 0.0
            assert all(choice.parameters <= rows * cols for choice in ladder)

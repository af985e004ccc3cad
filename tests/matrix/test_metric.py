"""The metric's errors are those of its definition, with the square roots written out."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from oracles import distance, observed, roots_of, seen, square_root, weighted_error
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.matrix import Metric
from htcompress.matrix.blocks import Blocks
from htcompress.matrix.inputs import Inputs
from htcompress.matrix.metric import RowRoot

ROWS, COLS = 12, 15


def metrics() -> dict[str, Metric]:
    full = observed(ROWS, COLS)
    return {
        "plain": Metric(ROWS, COLS),
        "gradients": Metric(ROWS, COLS, gradients=full.gradients),
        "diagonal": Metric(ROWS, COLS, gradients=full.gradients.diagonal().clone(), inputs=full.inputs),
        "inputs": Metric(ROWS, COLS, inputs=full.inputs),
        "both": full,
        "few samples": observed(ROWS, COLS, samples=4),
        "one sample": observed(ROWS, COLS, samples=1),
        "many samples": observed(ROWS, COLS, samples=200),
    }


NAMES = list(metrics())


@pytest.fixture(params=NAMES)
def metric(request: pytest.FixtureRequest) -> Metric:
    return metrics()[request.param]


def squared(metric: Metric, difference: Tensor) -> float:
    """The metric's squared error, the difference given in chunks of uneven widths."""
    edges = [0, 1, 6, difference.shape[1]]
    chunks = [slice(a, b) for a, b in pairwise(edges)]
    return metric.squared((where, difference[:, where].double()) for where in chunks)


def test_squared_is_the_definition(metric: Metric) -> None:
    for seed in range(3):
        difference = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed))
        assert squared(metric, difference) == pytest.approx(weighted_error(metric, difference), rel=1e-9)
    assert squared(metric, torch.zeros(ROWS, COLS)) == 0.0


def test_output_gram_is_the_definition(metric: Metric) -> None:
    matrix = torch.randn(ROWS, COLS, dtype=torch.float64)
    g, a = roots_of(metric)
    assert distance(metric.output_gram(Blocks.of(matrix)), g @ matrix @ a @ a @ matrix.T @ g) < 1e-9


def test_without_data_the_error_is_the_plain_one() -> None:
    difference = torch.randn(ROWS, COLS, dtype=torch.float64)
    plain = Metric(ROWS, COLS)
    assert plain.is_plain
    assert squared(plain, difference) == pytest.approx(float(difference.square().sum()), rel=1e-14)
    assert plain.shrinkage == (0.0, 1.0)
    assert plain.row_factors((3, 4)) is None
    assert plain.col_factors((3, 5)) is None
    assert not observed(ROWS, COLS).is_plain


@pytest.mark.parametrize("name", NAMES)
def test_products_and_grams_are_the_definition(name: str) -> None:
    metric = metrics()[name]
    g, a = roots_of(metric)
    rows, cols = torch.randn(ROWS, 3, dtype=torch.float64), torch.randn(COLS, 4, dtype=torch.float64)
    assert distance(metric.row_gram(rows), rows.T @ g @ g @ rows) < 1e-9
    assert distance(metric.through(cols), a @ a @ cols) < 1e-9
    assert distance(metric.col_gram(cols), cols.T @ a @ a @ cols) < 1e-9
    torch.autograd.gradcheck(metric.col_gram, cols.requires_grad_())


# ---- shrinkage ------------------------------------------------------------------------------------------


def shrinkage_by_definition(inputs: Tensor) -> float:
    """The amount of oracle approximating shrinkage, Chen et al. 2010, equation 23, traces exact."""
    n, p = inputs.shape
    moment = inputs.double().T @ inputs.double() / n
    trace, square = float(moment.trace()), float(moment.square().sum())
    return min(1.0, ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p)))


@pytest.mark.parametrize("samples", [2, 5, 30, 300, 3000])
def test_shrinkage_follows_its_formula_and_keeps_the_trace(samples: int) -> None:
    metric = observed(ROWS, 40, samples=samples)
    keep, ridge = metric.shrinkage
    x = metric.inputs.given
    assert 1 - keep * samples == pytest.approx(shrinkage_by_definition(x), rel=1e-6)
    trace = float(x.double().square().sum()) / samples
    assert keep * samples * trace + ridge * 40 == pytest.approx(trace, rel=1e-5)


def test_shrinkage_brings_the_moment_nearer_to_the_true_one() -> None:
    """The point of it: 20 samples of 40 numbers, many times."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.diag(torch.linspace(0.5, 2, 40, dtype=torch.float64))
    for _ in range(10):
        x = torch.randn(20, 40, generator=generator, dtype=torch.float64) @ truth.sqrt()
        metric = Metric(3, 40, inputs=seen(x.float()))
        _, root = roots_of(metric)
        assert distance(root @ root, truth) < 0.6 * distance(x.T @ x / 20, truth)


# ---- roots ----------------------------------------------------------------------------------------------


def test_the_row_root_is_applied_and_removed() -> None:
    for name in ("plain", "diagonal", "both"):
        metric = metrics()[name]
        g, _ = roots_of(metric)
        matrix = torch.randn(ROWS, 7, dtype=torch.float64)
        assert distance(metric.row_root.apply(matrix), g @ matrix) < 1e-9
        assert distance(metric.row_root.remove(metric.row_root.apply(matrix)), matrix) < 1e-10


def test_a_singular_row_metric_can_be_removed() -> None:
    delta = torch.randn(3, ROWS)
    root = RowRoot.of(delta.T @ delta, ROWS)
    matrix = torch.randn(ROWS, 7, dtype=torch.float64)
    assert distance(root.apply(matrix), square_root(delta.T @ delta) @ matrix) < 1e-2
    assert distance(root.remove(root.apply(matrix)), matrix) < 1e-6


@pytest.mark.parametrize("gradients", [torch.zeros(ROWS, ROWS), torch.zeros(ROWS)])
def test_gradients_of_zero_weigh_nothing(gradients: Tensor) -> None:
    """Of a layer that the output does not depend on: as if there were none."""
    inputs = Inputs.of(torch.randn(30, COLS))
    matrix = torch.randn(ROWS, COLS)
    metric = Metric(ROWS, COLS, gradients=gradients, inputs=inputs)
    assert squared(metric, matrix) == squared(Metric(ROWS, COLS, inputs=inputs), matrix) > 0
    assert metric.row_factors((3, 4)) is None


def test_inputs_of_zero_weigh_nothing() -> None:
    matrix = torch.randn(ROWS, COLS, dtype=torch.float64)
    metric = Metric(ROWS, COLS, inputs=Inputs.of(torch.zeros(30, COLS)))
    assert squared(metric, matrix) == pytest.approx(float(matrix.square().sum()))


def test_factors_of_a_kronecker_metric_are_exact() -> None:
    """G = G_1 x G_2 and A = A_1 x A_2: the Kronecker product of the modes' roots is the root."""
    generator = torch.Generator().manual_seed(0)

    def moment(size: int) -> Tensor:
        x = torch.randn(5 * size, size, generator=generator, dtype=torch.float64)
        return x.T @ x / len(x)

    g = torch.kron(moment(3), moment(4))
    rows = Metric(12, 4, gradients=g).row_factors((3, 4))
    assert distance(torch.kron(*rows), square_root(g)) < 1e-3
    # Inputs whose second moment is exactly that of the modes: the rows of its root, many samples for no shrinkage.
    a = torch.kron(moment(2), torch.kron(moment(3), moment(2)))
    root = square_root(a).float()
    metric = Metric(4, 12, inputs=Inputs.of(root.repeat(10_000, 1) * 12**0.5))
    cols = metric.col_factors((2, 3, 2))
    assert distance(torch.kron(cols[0], torch.kron(cols[1], cols[2])), square_root(a)) < 1e-3


@pytest.mark.parametrize("modes", [(ROWS,), (3, 4), (4, 2, 2), (5, 3)])
def test_row_factors_are_the_mean_moments_of_the_modes(modes: tuple[int, ...]) -> None:
    """Up to a scale, mode k's moment is G summed over all other modes; the diagonal of G gives its diagonal."""
    metric = observed(ROWS, COLS)
    padded = torch.zeros(prod(modes), prod(modes), dtype=torch.float64)
    padded[:ROWS, :ROWS] = metric.gradients
    grid = torch.arange(prod(modes)).reshape(modes)
    for k, root in enumerate(metric.row_factors(modes)):
        expected = torch.zeros(modes[k], modes[k], dtype=torch.float64)
        lines = grid.movedim(k, 0).reshape(modes[k], -1)
        for line in lines.T:
            expected += padded[line][:, line]
        found = root @ root
        assert distance(found / found.trace(), expected / expected.trace()) < 1e-3
    diagonal = Metric(ROWS, COLS, gradients=metric.gradients.diagonal().clone()).row_factors(modes)
    written_out = Metric(ROWS, COLS, gradients=torch.diag(metric.gradients.diagonal())).row_factors(modes)
    for a, b in zip(diagonal, written_out, strict=True):
        assert distance(a, b) < 1e-6


def test_misfits_are_named() -> None:
    for gradients in (torch.zeros(3, 3), torch.zeros(3), torch.zeros(ROWS, COLS)):
        with pytest.raises(ShapeError, match="12 rows"):
            Metric(ROWS, COLS, gradients=gradients)
    with pytest.raises(ShapeError, match="15 columns"):
        Metric(ROWS, COLS, inputs=Inputs.of(torch.zeros(5, ROWS)))

"""Coordinates of cores: other numbers for the same matrix, errors of which count as much as those of any other."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from oracles import distance, observed
from torch import Tensor

from htcompress.forms import BlockTerm, NetworkMatrix, TensorRing, TensorTrain
from htcompress.forms import coordinates as module
from htcompress.forms.coordinates import Coordinates
from htcompress.forms.ht import HTMatrix
from htcompress.forms.refine import refine_cores
from htcompress.matrix import Layout, Metric
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.tensor import HTTensor

ROWS, COLS = 12, 18
SPLIT, WHOLE = Layout.split((3, 4), (2, 3, 3)), Layout.split((ROWS,), (6, 3))
PAIRED = Layout.paired((2, 2, 3), (3, 3, 2))


def numbers(matrix: StoredMatrix) -> StoredMatrix:
    """Cores of different sizes and of no special form, in float64."""
    generator = torch.Generator().manual_seed(3)
    return matrix.with_cores(
        [
            torch.randn(core.shape, generator=generator, dtype=torch.float64) * 4.0**k
            if isinstance(core, Tensor)
            else core
            for k, core in enumerate(matrix.cores)
        ]
    )


def ht(layout: Layout, ranks: tuple[int, ...]) -> HTMatrix:
    return HTMatrix(layout, HTTensor.zeros(layout.tree, layout.shape, ranks))


TREES: dict[str, StoredMatrix] = {
    "split": ht(SPLIT, (2, 3, 4, 2, 3, 4, 2, 4, 1)),
    "identities at leaves": ht(SPLIT, (3, 2, 5, 2, 3, 6, 3, 5, 1)),
    "rows as they are": ht(WHOLE, (4, 5, 2, 4, 1)),
    "only columns stored": ht(Layout.split((3, 4), (18,)), (3, 4, 12, 12, 1)),
    "rank one": ht(WHOLE, (1, 2, 2, 1, 1)),
    "paired": ht(PAIRED, (4, 5, 3, 3, 1)),
    "train": NetworkMatrix.zeros(TensorTrain(PAIRED, (1, 4, 3))),
}
OTHERS: dict[str, StoredMatrix] = {
    "ring": NetworkMatrix.zeros(TensorRing(PAIRED, (2, 3, 3))),
    "block terms": NetworkMatrix.zeros(BlockTerm(PAIRED, (2, 3))),
    "padded": ht(Layout.split((4, 4), (4, 5), rows=ROWS, cols=COLS), (3, 2, 4, 3, 4, 4, 1)),
}


def metrics() -> dict[str, Metric]:
    full = observed(ROWS, COLS)
    return {
        "plain": Metric(ROWS, COLS),
        "diagonal": Metric(ROWS, COLS, gradients=full.gradients.diagonal().clone(), inputs=full.inputs),
        "both": full,
        "few samples": observed(ROWS, COLS, samples=5),
    }


def by_modes(metric: Metric, layout: Layout) -> Tensor:
    """The metric of vec(W) by the modes of a layout, from the factors that decompositions take."""
    sides = []
    for modes, factors, exact in (
        ([m for m in layout.row_modes if m > 1], metric.row_factors, metric.row_root.moment),
        ([n for n in layout.col_modes if n > 1], metric.col_factors, metric.input_moment),
    ):
        size = ROWS if not sides else COLS
        roots = factors(modes) if len(modes) > 1 else None
        eye = torch.eye(size, dtype=torch.float64)
        alone = exact if len(modes) == 1 and exact is not None else eye
        sides.append(alone if roots is None else reduce(torch.kron, [root @ root for root in roots]))
    return torch.kron(*sides)


@pytest.mark.parametrize("name", list(metrics()))
@pytest.mark.parametrize("form", [*TREES, *OTHERS])
def test_the_values_of_a_matrix_are_that_matrix(form: str, name: str) -> None:
    start = numbers((TREES | OTHERS)[form])
    found = Coordinates.of(start, metrics()[name])
    assert [float(torch.linalg.vector_norm(own)) for own in found.values] == pytest.approx([1.0] * len(found.values))
    assert sum(own.numel() for own in found.values) == start.parameters
    assert distance(found.matrix(found.values).dense(), start.dense()) < 1e-12
    narrow = found.to(torch.float32)
    assert narrow.matrix(narrow.values).dense().dtype == torch.float32
    assert distance(narrow.matrix(narrow.values).dense().double(), start.dense()) < 1e-5


@pytest.mark.parametrize("name", ["plain", "both", "few samples"])
@pytest.mark.parametrize("form", list(TREES))
def test_errors_of_all_numbers_of_all_cores_count_alike(monkeypatch: pytest.MonkeyPatch, form: str, name: str) -> None:
    """In a tree, the curvature at a core is the identity times ||W||^2: by Jacobians, which know of no frames."""
    monkeypatch.setattr(module, "_WEAKEST", 0.0)
    metric, start = metrics()[name], numbers(TREES[form])
    layout = start.network.layout if start.network is not None else PAIRED
    weights = by_modes(metric, layout)
    whole = start.dense().reshape(-1)
    size = float(whole @ weights @ whole)
    found = Coordinates.of(start, metric)
    for t, own in enumerate(found.values):

        def of(values: Tensor, t: int = t) -> Tensor:
            return found.matrix([*found.values[:t], values, *found.values[t + 1 :]]).dense().reshape(-1)

        jacobian = torch.autograd.functional.jacobian(of, own).reshape(ROWS * COLS, -1)
        curvature = jacobian.T @ weights @ jacobian
        eye = torch.eye(own.numel(), dtype=torch.float64)
        assert float((curvature / size - eye).abs().max()) < 1e-8


def test_weak_directions_count_as_if_they_were_stronger() -> None:
    """By a part of the strongest: the steps along what is hardly there stay of a size."""
    start = numbers(TREES["rows as they are"])
    rows, *rest = start.cores
    assert isinstance(rows, Tensor)
    weak = start.with_cores([rows * torch.tensor([1.0, 1e-6, 1e-6, 1e-6], dtype=torch.float64), *rest])
    found = Coordinates.of(weak, metrics()["both"])
    moved = [own + 1e-3 * torch.ones_like(own) for own in found.values]
    assert distance(found.matrix(moved).dense(), weak.dense()) < 0.2


@pytest.mark.parametrize("form", [*TREES, *OTHERS])
def test_cores_without_rank_and_of_zeros_are_refined(form: str) -> None:
    metric = metrics()["both"]
    wanted = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for start in ((TREES | OTHERS)[form], _lacking(numbers((TREES | OTHERS)[form]))):
        after = refine_cores(
            start.with_cores([c.double() if isinstance(c, Tensor) else c for c in start.cores]),
            WeightedMatrix.of(wanted, metric),
        )
        assert after.parameters == start.parameters
        assert bool(torch.isfinite(after.dense()).all())


def _lacking(matrix: StoredMatrix) -> StoredMatrix:
    """With a last column of zeros in every core: frames without full rank."""
    cores = [core.clone() if isinstance(core, Tensor) else core for core in matrix.cores]
    for core in cores:
        if isinstance(core, Tensor) and core.shape[-1] > 1:
            core[..., -1] = 0
    return matrix.with_cores(cores)

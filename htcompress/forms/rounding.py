"""A matrix in a form, rounded core by core so that each core makes up for what those before it have lost.

The error in the metric is quadratic in each core alone. Before a core is rounded it is put where that is least, given
the others, those that are rounded already among them; its own errors then make up for each other (`nearest_plane`).
The bases of an HT tensor are balanced and turned first, so that all numbers of a core are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from htcompress.forms.core_problem import col_moment, core_problem, row_moment
from htcompress.forms.dense import DenseMatrix
from htcompress.forms.ht import HTMatrix
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.storage.feedback import nearest_plane
from htcompress.storage.integer import Integer, column, nearest
from htcompress.tensor.gauge import turned


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix on the grids of its codecs.

    Attributes:
        codecs: of each core; None of an identity.
        scales: the scales that are kept of each core.
        error: the squared error in the metric.
    """

    matrix: StoredMatrix
    codecs: tuple[Integer | None, ...]
    scales: tuple[Tensor | None, ...]
    error: float

    @property
    def bytes(self) -> int:
        """What it takes, scales included."""
        pairs = zip(self.codecs, self.matrix.cores, strict=True)
        return sum(codec.bytes(tuple(core.shape), torch.float32) for codec, core in pairs if codec is not None)


def spread(matrix: StoredMatrix) -> StoredMatrix:
    """The same matrix from cores whose numbers are alike."""
    balanced = matrix.balance()
    if isinstance(balanced, HTMatrix):
        return HTMatrix(balanced.layout, turned(balanced.tensor))
    return balanced


def rounded_plainly(matrix: StoredMatrix, target: WeightedMatrix, bits: int) -> Rounded:
    """Every number of a matrix rounded to the nearest; its cores as they stand."""
    codecs = _codecs(matrix, bits)
    scales: list[Tensor | None] = [None] * len(codecs)
    cores = list(matrix.cores)
    for t, (codec, core) in enumerate(zip(codecs, matrix.cores, strict=True)):
        if codec is not None and isinstance(core, Tensor):
            scales[t] = codec.scales(core)
            cores[t] = codec.rounded(core.double(), scales[t])
    stored = matrix.with_cores(cores)
    return Rounded(stored, codecs, tuple(scales), target.error_of(stored))


def rounded_with_feedback(matrix: StoredMatrix, target: WeightedMatrix, bits: int) -> Rounded:
    """A matrix rounded so that errors make up for each other in the metric; no worse than `rounded_plainly`.

    Args:
        matrix: with its numbers `spread`; a form that is no product of two factors is rounded plainly.
        target: W and its metric.
        bits: 2 to 8.
    """
    best = rounded_plainly(matrix, target, bits)
    if isinstance(matrix, DenseMatrix):
        found = _dense(target, bits)
    elif matrix.factor_networks is not None:
        found = _Cores(matrix, target, bits).rounded()
    else:
        return best
    return min(best, found, key=lambda made: made.error)


def _codecs(matrix: StoredMatrix, bits: int) -> tuple[Integer | None, ...]:
    by_rows = isinstance(matrix, DenseMatrix)
    return tuple(Integer(bits, by_rows) if isinstance(core, Tensor) else None for core in matrix.cores)


def _grid(codec: Integer, scales: Tensor, like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What numbers are rounded to that stand in some rows of a core, for `nearest_plane`."""
    steps = column(scales, like)[:, 0]

    def to_grid(values: Tensor, rows: Tensor) -> Tensor:
        own = steps[rows] if codec.by_rows else steps
        return nearest(values / own, codec.width) * own

    return to_grid


def _dense(target: WeightedMatrix, bits: int) -> Rounded:
    values = target.matrix.dense().double()
    codec = Integer(bits, by_rows=True)
    scales = codec.scales(values)
    found = nearest_plane(values, _grid(codec, scales, values), row_moment(target), col_moment(target))
    matrix = DenseMatrix(found)
    return Rounded(matrix, (codec,), (scales,), target.error_of(matrix))


class _Cores:
    """A product of two factors on its way to the grid, core by core, the largest first."""

    def __init__(self, matrix: StoredMatrix, target: WeightedMatrix, bits: int) -> None:
        self.target, self.codec = target, Integer(bits)
        self.matrix = matrix.with_cores([c.double() if isinstance(c, Tensor) else c for c in matrix.cores])
        self.scales: list[Tensor | None] = [None] * len(matrix.cores)

    def rounded(self) -> Rounded:
        """All cores rounded, one after the other."""
        sizes = {t: core.numel() for t, core in enumerate(self.matrix.cores) if isinstance(core, Tensor)}
        for t in sorted(sizes, key=lambda t: -sizes[t]):
            self._round(t)
        codecs = _codecs(self.matrix, self.codec.width)
        return Rounded(self.matrix, codecs, tuple(self.scales), self.target.error_of(self.matrix))

    def _round(self, t: int) -> None:
        problem = core_problem(self.matrix, self.target, t)
        scales = self.codec.scales(problem.best)
        found = nearest_plane(problem.best, _grid(self.codec, scales, problem.best), problem.rows, problem.cols)
        self.scales[t] = scales
        cores = list(self.matrix.cores)
        cores[t] = found.reshape(self.matrix.operands()[t].shape)
        self.matrix = self.matrix.with_cores(cores)

"""A matrix in a form, rounded core by core so that each core makes up for what those before it have lost.

The error in the metric is quadratic in each core alone. Before a core is rounded it is put where that is least, given
the others, those that are rounded already among them; its own errors then make up for each other (`nearest_plane`).
The bases of an HT tensor are balanced and turned first, so that all numbers of a core are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from htcompress.forms.core_problem import CoreProblem, Feedback, core_problem
from htcompress.forms.dense import DenseMatrix
from htcompress.forms.ht import HTMatrix
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.storage.feedback import nearest_plane
from htcompress.storage.integer import Integer, column
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


def spread(matrix: StoredMatrix, seed: int = 0) -> StoredMatrix:
    """The same matrix from cores whose numbers are alike; its bases are turned as the seed has it."""
    balanced = matrix.balance()
    if isinstance(balanced, HTMatrix):
        return HTMatrix(balanced.layout, turned(balanced.tensor, seed))
    return balanced


def can_be_turned(matrix: StoredMatrix) -> bool:
    """Whether `spread` gives another matrix for another seed."""
    return isinstance(matrix, HTMatrix)


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


def rounded_with_feedback(matrix: StoredMatrix, feedback: Feedback, bits: int) -> Rounded:
    """A matrix rounded so that errors make up for each other in the metric; no worse than `rounded_plainly`.

    Args:
        matrix: with its numbers `spread`; a form that is no product of two factors is rounded plainly.
        feedback: of W and its metric.
        bits: 2 to 8.
    """
    best = rounded_plainly(matrix, feedback.target, bits)
    if isinstance(matrix, DenseMatrix):
        found = _dense(feedback, bits)
    elif matrix.factor_networks is not None:
        found = _Cores(matrix, feedback, bits).rounded()
    else:
        return best
    return min(best, found, key=lambda made: made.error)


def _codecs(matrix: StoredMatrix, bits: int) -> tuple[Integer | None, ...]:
    by_rows = isinstance(matrix, DenseMatrix)
    return tuple(Integer(bits, by_rows) if isinstance(core, Tensor) else None for core in matrix.cores)


def _to_grid(problem: CoreProblem, codec: Integer, scales: Tensor) -> Tensor:
    """The best numbers of a core rounded with feedback."""
    steps = column(scales, problem.best)[:, 0]
    steps = steps if codec.by_rows else steps.expand(len(problem.best))
    rows, cols = (None if moment is None else moment.lower for moment in (problem.rows, problem.cols))
    return nearest_plane(problem.best, steps, codec.width, rows, cols)


def _dense(feedback: Feedback, bits: int) -> Rounded:
    problem, codec = feedback.dense, Integer(bits, by_rows=True)
    scales = codec.scales(problem.best)
    matrix = DenseMatrix(_to_grid(problem, codec, scales))
    return Rounded(matrix, (codec,), (scales,), feedback.target.error_of(matrix))


class _Cores:
    """A product of two factors on its way to the grid, core by core, the largest first."""

    def __init__(self, matrix: StoredMatrix, feedback: Feedback, bits: int) -> None:
        self.feedback, self.codec = feedback, Integer(bits)
        self.matrix = matrix.with_cores([c.double() if isinstance(c, Tensor) else c for c in matrix.cores])
        self.scales: list[Tensor | None] = [None] * len(matrix.cores)

    def rounded(self) -> Rounded:
        """All cores rounded, one after the other."""
        sizes = {t: core.numel() for t, core in enumerate(self.matrix.cores) if isinstance(core, Tensor)}
        for t in sorted(sizes, key=lambda t: -sizes[t]):
            self._round(t)
        codecs = _codecs(self.matrix, self.codec.width)
        return Rounded(self.matrix, codecs, tuple(self.scales), self.feedback.target.error_of(self.matrix))

    def _round(self, t: int) -> None:
        problem = core_problem(self.matrix, self.feedback, t)
        scales = self.codec.scales(problem.best)
        found = _to_grid(problem, self.codec, scales)
        self.scales[t] = scales
        cores = list(self.matrix.cores)
        cores[t] = found.reshape(self.matrix.operands()[t].shape)
        self.matrix = self.matrix.with_cores(cores)

"""All cores of an HT matrix moved together to where the error in the exact metric is least.

HT-SVD is quasi-optimal, and within the halves of a split layout it sees the metric by modes only. From there
a few dozen steps of L-BFGS on the exact error, all cores at once, take off what is left.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.forms.coordinates import Coordinates
from htcompress.forms.ht_decompose import RootSplit
from htcompress.matrix.metric import RowRoot
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import COARSE, WeightedMatrix

ITERATIONS = 40
"""Of L-BFGS, to the end; a search lets candidates run against each other for fewer."""

_FINE = 1e-2
"""The part of the error of zero from which on float32 is enough to descend in: below, its rounding ends that early."""

Stored = TypeVar("Stored", bound=StoredMatrix)


def refine_cores(
    start: Stored, target: WeightedMatrix, split: RootSplit | None = None, *, iterations: int = ITERATIONS
) -> Stored:
    """Lower ||G^(1/2) (W - W') A^(1/2)|| over the cores of W' at its ranks.

    Args:
        start: where to begin; its structure is kept.
        target: W and its metric.
        split: of the target, with at least the ranks of `start`; found here if None.
        iterations: of L-BFGS.

    Returns:
        the refined matrix in float64; the caller compares its error with that of `start`.
    """
    if target.total <= 0:
        return start
    objective: _OfFactors | _OfMatrix
    if start.rank is not None:
        objective = _OfFactors(start, target, RootSplit.of(target) if split is None else split)
    else:
        objective = _OfMatrix(target)
    coordinates = Coordinates.of(start, target.metric)
    moved = coordinates.to(objective.dtype)
    free = [values.contiguous().clone().requires_grad_() for values in moved.values]
    optimizer = _LBFGS(
        free,
        max_iter=iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-12,
    )

    def closure() -> float:
        with torch.enable_grad():
            error = objective.at(moved.matrix(free))
            slopes = torch.autograd.grad(error, free)
        for values, slope in zip(free, slopes, strict=True):
            values.grad = slope.contiguous()
        return float(error.detach())

    optimizer.step(closure)
    return coordinates.matrix([values.detach().double() for values in free]).balance()


class _LBFGS(torch.optim.LBFGS):
    """torch's, without importing torch's compiler, which takes seconds, to keep it from what is never compiled."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        plain = torch.optim.Optimizer.add_param_group
        getattr(plain, "__wrapped__", plain)(self, param_group)


class _OfFactors:
    """The squared error of R C^T, relative to that of zero, by the split's leading directions.

    float32 is enough where the error is not small beside that; where the matrix is large, for all that it can tell.
    """

    def __init__(self, start: StoredMatrix, target: WeightedMatrix, split: RootSplit) -> None:
        small = target.dtype is torch.float64
        fine = target.error_of(start) < (_FINE if small else COARSE) * target.total or not target.fits_float32
        self.dtype = torch.float64 if fine else torch.float32
        self.split = split

    def at(self, stand_in: StoredMatrix) -> Tensor:
        """The error of a matrix."""
        factors = stand_in.factors()
        if factors is None:
            raise ShapeError("What is refined by its factors has a row factor and a column factor.")
        return self.split.error_of(*factors) / self.split.total


class _OfMatrix:
    """The squared error of any W', relative to that of zero; W' is written out."""

    dtype = torch.float64

    def __init__(self, target: WeightedMatrix) -> None:
        metric = target.metric
        # Divided by the total before anything is squared: whatever the scale of the data, what is summed is about 1.
        root = metric.row_root.root
        self.unit = target.total**-0.5
        self.root = RowRoot(None if root is None else (root * self.unit).float())
        self.weights = self._weighed(target.matrix.dense())
        self.inputs = metric.inputs
        self.keep, self.ridge = metric.shrinkage

    def _weighed(self, matrix: Tensor) -> Tensor:
        return self.root.apply((matrix.double() * self.unit if self.root.root is None else matrix).float())

    def at(self, stand_in: StoredMatrix) -> Tensor:
        """The error of a matrix."""
        lost = self.weights - self._weighed(stand_in.dense())
        error = (self.ridge**0.5 * lost).square().sum()
        if self.inputs is not None and self.keep > 0:
            error = error + (lost.T * self.keep * self.inputs.through(lost.T)).sum()
        return error

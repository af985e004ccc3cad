"""All cores of an HT matrix moved together to where the error in the exact metric is least.

HT-SVD is quasi-optimal, and within the halves of a split layout it sees the metric by modes only. From there
a few dozen steps of L-BFGS on the exact error, all cores at once, take off what is left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from htcompress.matrix.htmatrix import HTMatrix
from htcompress.matrix.target import COARSE, Target, along

ITERATIONS = 60


def refine_cores(start: HTMatrix, target: Target, *, iterations: int = ITERATIONS) -> HTMatrix:
    """Lower ||G^(1/2) (W - W') A^(1/2)|| over the cores of W' at its ranks.

    Args:
        start: where to begin; its structure is kept.
        target: W and its metric.
        iterations: of L-BFGS.

    Returns:
        the refined matrix in float64; the caller compares its error with that of `start`.
    """
    if target.total <= 0:
        return start
    objective = (_OfFactors if start.layout.is_split else _OfMatrix)(start, target)
    # Their bases suit the metric; well-scaled ones for training are another matter.
    stored = [
        None if core is None else core.double().contiguous().clone().requires_grad_()
        for core in start.tensor.equalise().cores
    ]
    free = [core for core in stored if core is not None]
    optimizer = torch.optim.LBFGS(
        free,
        max_iter=iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-12,
    )

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = objective.at(replace(start, tensor=replace(start.tensor, cores=tuple(stored))))
            value.backward()
        return float(value.detach())

    optimizer.step(closure)
    return replace(start, tensor=replace(start.tensor, cores=tuple(c if c is None else c.detach() for c in stored)))


class _OfFactors:
    """The squared error of R C^T, relative to that of zero, without a product of the size of W beside P C.

    With E an error and D the way on from it, ||E - D||^2 = ||E||^2 - 2 <G E A, D> + ||D||^2, where the large
    matrix P = G E A is formed once and the rest are Gram matrices of factors. E is W itself, or the error of
    the start where that is small beside W and would drown in the rounding of P.
    """

    def __init__(self, start: HTMatrix, target: Target) -> None:
        self.target = target
        rows, cols = (factor.detach().double() for factor in start.factors())
        self.error, self.weighed = target.total, target.weighed
        self.start = rows[:, :0], cols[:, :0]
        if target.error_of(start) < COARSE * target.total:
            lost = target.matrix.double() - rows @ cols.T
            self.error, self.weighed = target.metric.squared(lost), target.metric.weigh(lost)
            self.start = rows, cols
        self.along = along(self.weighed, *self.start)

    def at(self, stand_in: HTMatrix) -> Tensor:
        """The error of a matrix."""
        rows, cols = stand_in.factors()
        sides = torch.cat([rows, -self.start[0]], 1), torch.cat([cols, self.start[1]], 1)
        change = self.target.squared(*sides) - 2 * (along(self.weighed, rows, cols) - self.along)
        return (self.error + change) / self.target.total


class _OfMatrix:
    """The squared error of any W', relative to that of zero; W' is written out."""

    def __init__(self, start: HTMatrix, target: Target) -> None:
        metric = target.metric
        self.root = metric.row_root.float()
        self.weights = self.root.apply(target.matrix.float())
        self.inputs = metric.inputs
        keep, self.ridge = metric.shrinkage
        self.keep = 0.0 if self.inputs is None else keep / len(self.inputs)
        self.scale = target.total

    def at(self, stand_in: HTMatrix) -> Tensor:
        """The error of a matrix."""
        lost = self.weights - self.root.apply(stand_in.dense().float())
        error = self.ridge * lost.square().sum()
        if self.inputs is not None:
            error = error + self.keep * (lost @ self.inputs.T).square().sum()
        return error / self.scale

"""All cores of an HT matrix moved together to where the error in the exact metric is least.

HT-SVD is quasi-optimal, and within the halves of a split layout it sees the metric by modes only. From there
a few dozen steps of L-BFGS on the exact error, all cores at once, take off what is left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.matrix.htmatrix import HTMatrix
from htcompress.matrix.metric import Metric

ITERATIONS = 60


def refine_cores(
    start: HTMatrix,
    matrix: Float[Tensor, "rows cols"],
    metric: Metric,
    *,
    iterations: int = ITERATIONS,
    samples: int | None = None,
) -> HTMatrix:
    """Lower ||G^(1/2) (W - W') A^(1/2)|| over the cores of W' at its ranks.

    Args:
        start: where to begin; its structure is kept.
        matrix: (rows, cols) W.
        metric: G and A.
        iterations: of L-BFGS, in float32.
        samples: of the metric's inputs that are looked at (all if None).

    Returns:
        the refined matrix in float64, balanced; the caller compares its error with that of `start`.
    """
    objective = _Objective(start, matrix, metric, samples)
    stored = [
        None if core is None else core.float().contiguous().clone().requires_grad_()
        for core in start.tensor.balance().cores
    ]
    free = [core for core in stored if core is not None]
    optimizer = torch.optim.LBFGS(
        free, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = objective.at(replace(start, tensor=replace(start.tensor, cores=tuple(stored))))
            value.backward()
        return float(value.detach())

    optimizer.step(closure)
    cores = tuple(None if core is None else core.detach().double() for core in stored)
    return replace(start, tensor=replace(start.tensor, cores=cores))


class _Objective:
    """The squared error divided by that of a zero matrix, up to rounding; no product larger than W itself."""

    def __init__(self, start: HTMatrix, matrix: Tensor, metric: Metric, samples: int | None) -> None:
        self.split = start.layout.is_split
        self.root = metric.row_root.float()
        self.weights = self.root.apply(matrix.float())
        # Condensed inputs are no samples: a part of them would be another metric.
        some = samples if metric.samples is None else None
        self.inputs = None if metric.inputs is None else metric.inputs[:some]
        keep, self.ridge = metric.shrinkage
        self.keep = 0.0 if self.inputs is None else keep / len(self.inputs)
        self.outputs = None if self.inputs is None else self.weights @ self.inputs.T
        total = self.ridge * self.weights.square().sum()
        if self.outputs is not None:
            total = total + self.keep * self.outputs.square().sum()
        self.scale = float(total) or 1.0

    def at(self, stand_in: HTMatrix) -> Tensor:
        """The error of a matrix with float32 cores."""
        if not self.split:
            lost = self.weights - self.root.apply(stand_in.dense())
            error = self.ridge * lost.square().sum()
            if self.inputs is not None:
                error = error + self.keep * (lost @ self.inputs.T).square().sum()
            return error / self.scale
        rows, cols = stand_in.factors()
        scaled = self.root.apply(rows)
        error = self.ridge * (self.weights - scaled @ cols.T).square().sum()
        if self.inputs is not None and self.outputs is not None:
            error = error + self.keep * (self.outputs - scaled @ (cols.T @ self.inputs.T)).square().sum()
        return error / self.scale

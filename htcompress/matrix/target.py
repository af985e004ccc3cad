"""A matrix to be approximated, and what an error of it counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from htcompress.matrix.htmatrix import HTMatrix
from htcompress.matrix.metric import Metric

COARSE = 1e-4
"""The part of `total` above which an error is exact enough as a difference of large numbers."""


@dataclass(frozen=True, eq=False)
class Target:
    """W (rows, cols) in its metric: the squared error of a stand-in is ||G^(1/2) (W - W') A^(1/2)||^2."""

    matrix: Float[Tensor, "rows cols"]
    metric: Metric

    @cached_property
    def weighed(self) -> Float[Tensor, "rows cols"]:
        """G W A: with it, the error of a product of factors takes no other matrix of the size of W."""
        return self.metric.weigh(self.matrix)

    @cached_property
    def total(self) -> float:
        """The squared error of a zero matrix: the scale of all errors."""
        rows = zip(self.matrix.split(256), self.weighed.split(256), strict=True)
        return sum(float((a.double() * b.double()).sum()) for a, b in rows)

    def error_of(self, stand_in: HTMatrix) -> float:
        """The squared error of a stand-in."""
        if not stand_in.layout.is_split:
            return self.metric.squared(self.matrix.double() - stand_in.dense())
        rows, cols = (factor.double() for factor in stand_in.factors())
        error = self.total - 2 * float(along(self.weighed, rows, cols)) + float(self.squared(rows, cols))
        if error > COARSE * self.total:
            return error
        return self.metric.squared(self.matrix.double() - rows @ cols.T)

    def squared(self, rows: Float[Tensor, "rows r"], cols: Float[Tensor, "cols r"]) -> Tensor:
        """||G^(1/2) R C^T A^(1/2)||^2."""
        return (self.metric.row_gram(rows) * self.metric.col_gram(cols)).sum()


def along(weighed: Float[Tensor, "rows cols"], rows: Float[Tensor, "rows r"], cols: Float[Tensor, "cols r"]) -> Tensor:
    """<P, R C^T>."""
    return (rows * (weighed @ cols.to(weighed.dtype)).to(rows.dtype)).sum()

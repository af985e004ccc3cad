"""A matrix to be approximated, and what an error of it counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.matrix.blocks import DOUBLED, LARGE, Blocks
from htcompress.matrix.metric import Metric
from htcompress.matrix.stored import StoredMatrix
from htcompress.side_by_side import cached_property

GRAM_ROWS = 3000
"""The most rows of which a Gram matrix is formed."""

_NARROW = 1e-20, 1e20
"""Totals that float32 is wide enough for, with what is summed up on the way."""

COARSE = 1e-4
"""The part of `total` above which an error is exact enough as a difference of large numbers."""


@dataclass(frozen=True, eq=False)
class WeightedMatrix:
    """W (rows, cols) in its metric: the squared error of a stand-in is ||G^(1/2) (W - W') A^(1/2)||^2."""

    matrix: Blocks
    metric: Metric

    @classmethod
    def of(cls, matrix: Float[Tensor, "rows cols"] | Blocks, metric: Metric) -> WeightedMatrix:
        """A matrix in a metric."""
        return cls(Blocks.of(matrix), metric)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of thin factors: float64 where the matrix is small or its error leaves float32's range."""
        return torch.float32 if self.matrix.numel() > DOUBLED and self.fits_float32 else torch.float64

    @property
    def fits_float32(self) -> bool:
        """Whether float32's range is wide enough for what its errors are summed up of."""
        return _NARROW[0] <= self.total <= _NARROW[1]

    @cached_property
    def inputs_root(self) -> Float[Tensor, "cols cols"] | None:
        """A lower triangular F with F F^T = A, in float64; None unless the columns are the fewer, and not many."""
        rows, cols = self.matrix.shape
        if not cols < rows <= GRAM_ROWS:
            return None
        factor, failed = torch.linalg.cholesky_ex(self.metric.input_moment)
        return None if int(failed) else factor

    @cached_property
    def gram(self) -> Float[Tensor, "n n"] | None:
        """The Gram matrix of G^(1/2) W A^(1/2) in float64, whose squared singular values are its eigenvalues.

        Of the columns, F^T W^T G W F, where there is an `inputs_root`, else of the rows; None where these are too many.
        """
        factor = self.inputs_root
        if factor is not None:
            weighed = self.metric.row_root.apply(self.matrix.dense().double())
            return factor.T @ (weighed.T @ weighed) @ factor
        return self.metric.output_gram(self.matrix) if self.matrix.shape[0] <= GRAM_ROWS else None

    @cached_property
    def total(self) -> float:
        """The squared error of a zero matrix: the scale of all errors."""
        return self.metric.squared(self.matrix.chunks()) if self.gram is None else float(self.gram.trace())

    def factors_of(self, stand_in: StoredMatrix) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "cols r"]] | None:
        """R and C of a stand-in in float64, or C in `dtype` where it is large; None where it is no such product."""
        large = (stand_in.rank or 0) * self.matrix.shape[1] > LARGE
        if large:
            # In float64 it would be twice the memory before anything is done with it.
            cores = [core.to(self.dtype) if isinstance(core, Tensor) else core for core in stand_in.cores]
            stand_in = stand_in.with_cores(cores)
        factors = stand_in.factors()
        if factors is None:
            return None
        rows, cols = factors
        return rows.double(), cols if large else cols.double()

    def error_of(self, stand_in: StoredMatrix) -> float:
        """The squared error of a stand-in."""
        factors = self.factors_of(stand_in)
        if factors is None:
            return self.metric.squared(self._lost(stand_in.dense(), None))
        rows, cols = factors
        weighed, through = self.metric.row_root.weigh(rows), self.metric.through(cols)
        along = (weighed * self.matrix.times(through).double()).sum()
        error = self.total - 2 * float(along) + float(((rows.T @ weighed) * (cols.T @ through).double()).sum())
        return error if error > COARSE * self.total else self.metric.squared(self._lost(rows, cols))

    def weight_error_of(self, stand_in: StoredMatrix, scales: Float[Tensor, " cols"] | None = None) -> float:
        """The plain relative error ||(W - W') D|| / ||W D||, with D the scales of the columns or the identity."""

        def squared(chunks: Iterable[tuple[slice, Tensor]]) -> float:
            return sum(float((c if scales is None else c * scales[at]).square().sum()) for at, c in chunks)

        factors = self.factors_of(stand_in) or (stand_in.dense(), None)
        return relative(squared(self._lost(*factors)), squared(self.matrix.chunks()))

    def _lost(self, rows: Tensor, cols: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """W - R C^T, or W - R without C, in float64, a few columns at a time."""
        for where, chunk in self.matrix.chunks():
            instead = rows[:, where] if cols is None else rows @ cols[where].to(rows.dtype).T
            yield where, chunk - instead.double()


def relative(error: float, total: float) -> float:
    """A squared error as a relative one; 0 where there is nothing to lose."""
    return (error / total) ** 0.5 if total > 0 else 0.0

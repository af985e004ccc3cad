"""A folded matrix in its metric, mode by mode: a Kronecker product of small roots on either side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from htcompress.matrix.blocks import working
from htcompress.matrix.layout import Layout
from htcompress.matrix.weighted import WeightedMatrix


@dataclass(frozen=True, eq=False)
class Whitening:
    """The roots of a metric for each row mode and each column mode of a layout; None for the identity."""

    layout: Layout
    roots: tuple[list[Tensor] | None, list[Tensor] | None]

    @classmethod
    def of(cls, target: WeightedMatrix, layout: Layout) -> Whitening:
        """The roots of a target's metric."""
        return cls(layout, (target.metric.row_factors(layout.row_modes), target.metric.col_factors(layout.col_modes)))

    def folded(self, target: WeightedMatrix) -> Tensor:
        """The target's matrix as a tensor of shape `layout.shape`, multiplied by the roots."""
        layout = self.layout
        folded = layout.fold(working(target.matrix.dense()))
        for k in range(layout.tree.order):
            m, n = layout.row_modes[k], layout.col_modes[k]
            for side, root in enumerate(self.roots):
                if root is not None:
                    shape = folded.shape
                    parted = folded.reshape(*shape[:k], m, n, *shape[k + 1 :])
                    folded = multiply(root[k].to(parted.dtype), parted, k + side).reshape(shape)
        return folded

    def removed(self, k: int, core: Tensor) -> Tensor:
        """A core whose first axis is mode k, (m_k n_k, ...), with the roots taken off."""
        parted = core.reshape(self.layout.row_modes[k], self.layout.col_modes[k], *core.shape[1:])
        for side, root in enumerate(self.roots):
            if root is not None:
                parted = solve(root[k], parted, side)
        return parted.reshape(core.shape)


def multiply(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """A matrix times a tensor along one of its axes; along the first or the last without moving any."""
    if axis == tensor.ndim - 1:
        return tensor @ matrix.T
    if axis == 0:
        return (matrix @ tensor.reshape(len(tensor), -1)).reshape(len(matrix), *tensor.shape[1:])
    return torch.tensordot(matrix, tensor, dims=([1], [axis])).movedim(0, axis)


def solve(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """The inverse of a matrix times a tensor along one of its axes."""
    moved = tensor.movedim(axis, 0)
    return torch.linalg.solve(matrix, moved.reshape(len(moved), -1)).reshape(moved.shape).movedim(0, axis)

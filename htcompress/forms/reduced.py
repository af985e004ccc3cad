"""A large tensor reduced to the leading subspaces of its modes, where every decomposition is cheap."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from htcompress.matrix.blocks import working
from htcompress.matrix.whitening import multiply

_NUMBERS = 60_000
"""Of a reduced tensor: tensorly decomposes as many in milliseconds."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A tensor as a smaller one times orthonormal bases of its modes, (size, kept).

    Attributes:
        lost: the squared error of that.
        found: what a structure has found of it and goes on from, by its rank.
    """

    core: Tensor
    bases: tuple[Tensor, ...]
    lost: float
    found: dict[int, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tensor: Tensor) -> Reduced:
        """Project on the leading singular subspaces, in float64."""
        tensor = working(tensor)
        total = float(tensor.double().square().sum())
        most = max(2, int(_NUMBERS ** (1 / tensor.ndim)))
        bases = []
        for axis in range(tensor.ndim):
            unfolded = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
            gram = (unfolded @ unfolded.T).double()
            _, vectors = torch.linalg.eigh(gram)
            basis = vectors.flip(1)[:, : min(most, *unfolded.shape)]
            bases.append(basis)
            tensor = multiply(basis.T.to(tensor.dtype), tensor, axis)
        core = tensor.double()
        return cls(core, tuple(bases), max(0.0, total - float(core.square().sum())))

    def spectra(self) -> list[Tensor]:
        """The singular values where the modes up to k are parted from the rest, k = 0, 1, ..."""
        shape = self.core.shape
        return [torch.linalg.svdvals(self.core.reshape(prod(shape[: k + 1]), -1)) for k in range(len(shape) - 1)]

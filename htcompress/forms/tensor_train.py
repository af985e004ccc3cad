"""Tensor trains: rings that are open, r_0 = 1. Source: Oseledets 2011."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.forms.reduced import Reduced
from htcompress.forms.tensor_ring import TensorRing
from htcompress.matrix.layout import Layout
from htcompress.vocabulary import Format


@dataclass(frozen=True)
class TensorTrain(TensorRing):
    """Cores G_k (r_k, m_k n_k, r_k+1) in a row, r_0 = r_d = 1."""

    format = Format.TT
    orders = (2, 3, 4)
    fixed = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks[0] != 1:
            raise ShapeError(f"A tensor train begins and ends with rank 1; found {self.ranks}.")

    def _factors(self, tensor: Tensor) -> list[Tensor]:
        from tensorly.decomposition import tensor_train

        return list(tensor_train(tensor, rank=[1, *self.ranks[1:], 1]).factors)

    @classmethod
    def _start(cls, layout: Layout, reduced: Reduced, budget: int) -> Self:
        return cls.smallest(layout)

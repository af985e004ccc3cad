"""Tensor rings. Source: Zhao et al. 2016, arXiv 1606.05535."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import isqrt
from typing import ClassVar, Self

import torch
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.forms.reduced import Reduced
from htcompress.forms.structure import Structure, padded
from htcompress.isolation import made_on
from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network
from htcompress.matrix.whitening import multiply
from htcompress.vocabulary import Format


@dataclass(frozen=True)
class TensorRing(Structure):
    """Cores G_k (r_k, m_k n_k, r_k+1) in a ring, r_d = r_0."""

    format = Format.TR
    orders: ClassVar[Sequence[int]] = (3, 4)
    mode_axis = 1
    fixed: ClassVar[int] = 2
    """How many of the ranks are not grown: the first two of a ring share the rank of its first mode."""

    def __post_init__(self) -> None:
        if len(self.ranks) != self.layout.tree.order or min(self.ranks) < 1:
            raise ShapeError(f"A ring of {self.layout.tree.order} cores has as many ranks; found {self.ranks}.")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"G{k}" for k in range(len(self.ranks)))

    @property
    def rank_names(self) -> tuple[str, ...]:
        return tuple(f"r{k}" for k in range(len(self.ranks)))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        after = (*self.ranks[1:], self.ranks[0])
        return tuple(zip(self.ranks, self.layout.shape, after, strict=True))

    @property
    def network(self) -> Network:
        legs: list[tuple[str, ...]] = []
        shapes: list[tuple[int, ...]] = []
        d = len(self.ranks)
        for k in range(d):
            names, sizes = self._modes(k)
            # One core alone would meet itself.
            following = f"r{(k + 1) % d}" if d > 1 else "end"
            legs.append((f"r{k}", *names, following))
            shapes.append((self.ranks[k], *sizes, self.ranks[(k + 1) % d]))
        return Network(self.layout, tuple(legs), tuple(shapes))

    def decompose(self, reduced: Reduced) -> list[Tensor]:
        import tensorly  # it takes a second to import, which only comparisons need

        with tensorly.backend_context("pytorch"), made_on(reduced.core.device):
            found = self._factors(reduced.core)
        cores = [multiply(basis, core, 1) for basis, core in zip(reduced.bases, found, strict=True)]
        return [padded(core, shape) for core, shape in zip(cores, self.shapes, strict=True)]

    def _factors(self, tensor: Tensor) -> list[Tensor]:
        from tensorly.decomposition import tensor_ring

        return list(tensor_ring(tensor, rank=[*self.ranks, self.ranks[0]]).factors)

    def contracted(self, modal: Sequence[Tensor], rest: Sequence[Tensor], like: Tensor) -> Tensor:
        product = modal[0]
        for core in modal[1:]:
            product = torch.tensordot(product, core, dims=1)
        return torch.diagonal(product, dim1=0, dim2=-1).sum(-1)

    @classmethod
    def smallest(cls, layout: Layout) -> Self:
        return cls(layout, (1,) * layout.tree.order)

    @classmethod
    def within(cls, layout: Layout, reduced: Reduced, budget: int) -> list[Self]:
        start = cls._start(layout, reduced, budget)
        return [] if start.parameters > budget else [start._grown(reduced, budget)]

    @classmethod
    def _start(cls, layout: Layout, reduced: Reduced, budget: int) -> Self:
        """Equal ranks, as large as fit; the first two are the factors of a rank of the first mode."""
        d = layout.tree.order
        first = reduced.core.shape[0]
        found = cls.smallest(layout)
        for r in count(2):
            tried = cls(layout, (min(r, isqrt(first)),) * min(2, d) + (r,) * (d - 2))
            if tried.parameters > budget or r > max(reduced.core.shape):
                break
            found = tried
        return found

    def _grown(self, reduced: Reduced, budget: int) -> Self:
        """Ranks raised one at a time, where the error falls most for the numbers spent.

        The bonds of a tensor train are known by their singular values. Those of a ring are taken alike, but the
        first two, which stay.
        """
        cls, layout, ranks = type(self), self.layout, list(self.ranks)
        spectra, closing, shape = reduced.spectra(), ranks[0], reduced.core.shape
        while True:
            best: tuple[float, int] | None = None
            own = cls(layout, tuple(ranks)).parameters
            for k in range(1 if closing == 1 else self.fixed, len(ranks)):
                values = spectra[k - 1]
                used = ranks[k] * closing
                if used >= len(values) or (closing == 1 and ranks[k] >= ranks[k - 1] * shape[k - 1]):
                    continue
                grown = cls(layout, (*ranks[:k], ranks[k] + 1, *ranks[k + 1 :])).parameters
                if grown > budget:
                    continue
                gain = float(values[used : used + closing].square().sum()) / (grown - own)
                if best is None or gain > best[0]:
                    best = gain, k
            if best is None:
                return cls(layout, tuple(ranks))
            ranks[best[1]] += 1

"""Block terms: sums of Tucker tensors. Source: De Lathauwer 2008; Ye et al. 2018, arXiv 1712.05134."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.forms.reduced import Reduced
from htcompress.forms.structure import Structure, padded
from htcompress.isolation import made_on
from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network
from htcompress.vocabulary import Format

_TUCKER_ROUNDS = 2
"""Of alternating least squares for each block: refinement in the metric follows, which needs no more of a start."""

_RANKS, _MOST_BLOCKS = (1, 2, 3, 4, 6, 8), 12
"""The structures looked at: those that the paper's tables span, with room."""


@dataclass(frozen=True)
class BlockTerm(Structure):
    """A sum of P Tucker tensors of rank R in every mode: factors U_k (m_k n_k, R, P), one core B (R, ..., R, P).

    `ranks` is (P, R).
    """

    format = Format.BT
    orders = (3, 4)
    mode_axis = 0

    def __post_init__(self) -> None:
        if len(self.ranks) != 2 or min(self.ranks) < 1:
            raise ShapeError(f"A block term has a number of blocks and a rank; found {self.ranks}.")

    @property
    def names(self) -> tuple[str, ...]:
        return (*(f"U{k}" for k in range(self.layout.tree.order)), "B")

    @property
    def rank_names(self) -> tuple[str, ...]:
        return "blocks", "rank"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        blocks, rank = self.ranks
        return *((size, rank, blocks) for size in self.layout.shape), (*[rank] * self.layout.tree.order, blocks)

    @property
    def network(self) -> Network:
        blocks, rank = self.ranks
        legs: list[tuple[str, ...]] = []
        shapes: list[tuple[int, ...]] = []
        d = self.layout.tree.order
        for k in range(d):
            names, sizes = self._modes(k)
            legs.append((*names, f"r{k}", "block"))
            shapes.append((*sizes, rank, blocks))
        legs.append((*(f"r{k}" for k in range(d)), "block"))
        shapes.append((*[rank] * d, blocks))
        return Network(self.layout, tuple(legs), tuple(shapes))

    def decompose(self, reduced: Reduced) -> list[Tensor]:
        """One Tucker tensor after the other, each of what the ones before it have left."""
        blocks, rank = self.ranks
        # More blocks of one rank begin with those of fewer.
        terms: _Terms = reduced.found.setdefault(rank, _Terms(rank, reduced.core))
        found = terms.first(blocks)
        factors = [
            torch.stack([padded(basis @ own[k], (len(basis), rank)) for _, own in found], dim=-1)
            for k, basis in enumerate(reduced.bases)
        ]
        return [*factors, torch.stack([padded(core, (rank,) * core.ndim) for core, _ in found], dim=-1)]

    def contracted(self, modal: Sequence[Tensor], rest: Sequence[Tensor], like: Tensor) -> Tensor:
        total = torch.zeros_like(like)
        for block in range(self.ranks[0]):
            part = rest[0][..., block]
            for k, factor in enumerate(modal):
                part = torch.tensordot(factor[..., block], part, dims=([1], [k])).movedim(0, k)
            total = total + part
        return total

    @classmethod
    def smallest(cls, layout: Layout) -> Self:
        return cls(layout, (1, 1))

    @classmethod
    def within(cls, layout: Layout, reduced: Reduced, budget: int) -> list[Self]:
        found = []
        for rank in _RANKS:
            blocks = budget // cls(layout, (1, rank)).parameters
            if blocks >= 1:
                found.append(cls(layout, (min(blocks, _MOST_BLOCKS), rank)))
        return found


@dataclass(eq=False)
class _Terms:
    """The Tucker tensors of one rank that have been found, and what they leave of a tensor."""

    rank: int
    left: Tensor
    found: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)

    def first(self, blocks: int) -> list[tuple[Tensor, list[Tensor]]]:
        """So many of them: core and factors."""
        import tensorly  # it takes a second to import, which only comparisons need
        from tensorly.decomposition import tucker

        with tensorly.backend_context("pytorch"), made_on(self.left.device):
            while len(self.found) < blocks:
                ranks = [min(self.rank, size) for size in self.left.shape]
                core, own = tucker(self.left, rank=ranks, n_iter_max=_TUCKER_ROUNDS, tol=1e-6)
                self.left = self.left - tensorly.tucker_to_tensor((core, own))
                self.found.append((core, own))
        return self.found[:blocks]

"""The structure of a matrix in tensor-train, tensor-ring or block-term format: cores, their sizes, what joins them.

All of them fold the matrix into paired modes: mode k has size m_k n_k, a row mode times a column mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from htcompress.errors import ShapeError
from htcompress.formats.format import Format
from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network


@dataclass(frozen=True)
class Structure:
    """What `Ring` and `BlockTerm` share.

    Args:
        layout: the folding; its tree plays no part.
        ranks: their meaning is the format's.
    """

    layout: Layout
    ranks: tuple[int, ...]

    @property
    def format(self) -> Format:
        """Which format it is."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """Of the cores."""
        raise NotImplementedError

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the cores, in order."""
        raise NotImplementedError

    @property
    def network(self) -> Network:
        """How the cores hang together."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        """The numbers stored.

        >>> layout = Layout.paired((16, 4, 4, 4), (8, 20, 20, 18))  # the four gates of 256 units, 57,600 inputs
        >>> Ring(layout, (1, 4, 4, 4)).parameters, BlockTerm(layout, (2, 4)).parameters  # as published
        (3360, 3392)
        """
        return sum(prod(shape) for shape in self.shapes)

    def to_config(self) -> dict[str, Any]:
        """The structure as JSON values."""
        return {"form": self.format.value, "layout": self.layout.to_config(), "ranks": list(self.ranks)}

    @staticmethod
    def from_config(config: dict[str, Any]) -> Structure:
        """The inverse of `to_config`."""
        form = BlockTerm if config["form"] == Format.BT else Ring
        return form(Layout.from_config(config["layout"]), tuple(config["ranks"]))

    def _modes(self, k: int) -> tuple[tuple[str, str], tuple[int, int]]:
        return (f"m{k}", f"n{k}"), (self.layout.row_modes[k], self.layout.col_modes[k])


@dataclass(frozen=True)
class Ring(Structure):
    """Cores G_k (r_k, m_k n_k, r_k+1) in a ring; a tensor train where r_0 is 1.

    Source: Oseledets 2011 (TT); Zhao et al. 2016, arXiv 1606.05535 (TR).
    """

    def __post_init__(self) -> None:
        if len(self.ranks) != self.layout.tree.order or min(self.ranks) < 1:
            raise ShapeError(f"A ring of {self.layout.tree.order} cores has as many ranks; found {self.ranks}.")

    @property
    def format(self) -> Format:
        return Format.TT if self.ranks[0] == 1 else Format.TR

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"G{k}" for k in range(len(self.ranks)))

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


@dataclass(frozen=True)
class BlockTerm(Structure):
    """A sum of P Tucker tensors of rank R in every mode: factors U_k (m_k n_k, R, P), one core B (R, ..., R, P).

    `ranks` is (P, R). Source: De Lathauwer 2008; Ye et al. 2018, arXiv 1712.05134.
    """

    def __post_init__(self) -> None:
        if len(self.ranks) != 2 or min(self.ranks) < 1:
            raise ShapeError(f"A block term has a number of blocks and a rank; found {self.ranks}.")

    @property
    def format(self) -> Format:
        return Format.BT

    @property
    def names(self) -> tuple[str, ...]:
        return (*(f"U{k}" for k in range(self.layout.tree.order)), "B")

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

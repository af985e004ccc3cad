"""The way up through ranks by a program of C: what `_upwards` of `ranks` sees, in the same order."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from htcompress.tensor.tree import DimensionTree

_ROOM = 1 << 13
"""Points that there is room for at first; four times as many where they are more."""


class _Model(ctypes.Structure):
    """`Model` of the program."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("nodes", "edges", "fine")),
        ("offset", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("edge", "children", "full", "start", "tails")),
    )


class _Points(ctypes.Structure):
    """`Points` of the program."""

    _fields_ = (("most", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("ranks", "parameters", "bounds")))


@dataclass(frozen=True, eq=False)
class Seen:
    """Points (ranks, parameters, bound); the first is rank one.

    Attributes:
        last: which of them the way ended at.
        is_open: whether the root's rank can still rise from there, and nothing else.
    """

    ranks: NDArray[np.int64]
    parameters: NDArray[np.int64]
    bounds: NDArray[np.float64]
    last: int
    is_open: bool

    def point(self, at: int) -> tuple[tuple[int, ...], int, float]:
        """The ranks of one, its parameters and its bound."""
        return tuple(self.ranks[at].tolist()), int(self.parameters[at]), float(self.bounds[at])

    def front(self) -> list[int]:
        """The points that no other beats in both numbers and bound, by ascending numbers."""
        order = np.lexsort((self.bounds, self.parameters))
        bounds = self.bounds[order]
        kept = np.ones(len(order), dtype=bool)
        kept[1:] = bounds[1:] < np.minimum.accumulate(bounds)[:-1]
        found: list[int] = order[kept].tolist()
        return found


class Costs(Protocol):
    """What of a `RankModel` the way up depends on; see there."""

    tree: DimensionTree
    shape: tuple[int, ...]
    full: list[int]
    edges: list[int]
    tails: list[list[float]]
    offset: float


def climbed(program: ctypes.CDLL, costs: Costs, fine: int, max_parameters: float, max_tail: float) -> Seen:
    """All points of the way up from rank one, for a tree of two leaves or more.

    Args:
        fine: an edge is raised by one part in so many.
        max_parameters: of all points but the first.
        max_tail: the bound that ends it.
    """
    tree, shape, tails = costs.tree, costs.shape, costs.tails
    children = np.array([node.children or (shape[node.leaves[0]], -1) for node in tree.nodes], dtype=np.int64)
    start = np.cumsum([0, *map(len, tails)], dtype=np.int64)
    flat = np.array([tail for own in tails for tail in own], dtype=np.float64)
    highest, summed = np.array(costs.full, dtype=np.int64), np.array(costs.edges, dtype=np.int64)
    held = summed, children, highest, start, flat
    model = _Model(len(tree.nodes), len(summed), fine, costs.offset, *(array.ctypes.data for array in held))
    last, is_open, room = ctypes.c_int64(), ctypes.c_int64(), _ROOM
    climb: Any = program.upwards
    climb.restype = ctypes.c_int64
    while True:
        ranks = np.empty((room, len(tree.nodes)), dtype=np.int64)
        parameters, bounds = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.float64)
        points = _Points(room, ranks.ctypes.data, parameters.ctypes.data, bounds.ctypes.data)
        limits = ctypes.c_double(max_parameters), ctypes.c_double(max_tail)
        count = climb(ctypes.byref(model), ctypes.byref(points), *limits, ctypes.byref(last), ctypes.byref(is_open))
        if count >= 0:
            return Seen(ranks[:count], parameters[:count], bounds[:count], last.value, bool(is_open.value))
        room *= 4

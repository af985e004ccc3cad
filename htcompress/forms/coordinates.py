"""Coordinates of a matrix's cores in which an error of one counts about as much as an error of any other.

Where the frames below a core are orthonormal in the metric, what an error of it counts is what stands above it: in a
tree, the squared singular values of its edge. In the numbers that are stored it is that times the condition of the
modes' moments and of the frames, and a descent takes several times as many steps.

Source: the canonical forms of tensor networks (Grasedyck 2010, section 3.4; Schollwoeck 2011, section 4.4), here as the
change of variables that conditions a descent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.matrix.layout import Layout
from htcompress.matrix.metric import Metric, Triangle
from htcompress.matrix.network import Network
from htcompress.matrix.stored import Core, StoredMatrix
from htcompress.matrix.whitening import multiply
from htcompress.tensor import Identity

_WEAKEST = 0.2
"""Of an edge's largest singular value: weaker ones count as if they were this much. Where a lot is still to be gained,
others are found than those of the start."""

Stored = TypeVar("Stored", bound=StoredMatrix)


@dataclass(frozen=True, eq=False)
class _Place:
    """One core among the others.

    Attributes:
        core: in the network's axes, and in the metric: the columns of the frame that it is the top of are orthonormal.
        opened: by the axes that are modes, what takes the metric off.
        up: the axis to the core above; None: there is none.
        above: that core, and its axis.
    """

    core: Tensor
    opened: dict[int, Float[Tensor, "n n"]]
    up: int | None = None
    above: tuple[int, int] | None = None

    def weighed(self, above: Float[Tensor, "r r"] | None) -> tuple[Tensor, dict[int, Tensor]]:
        """The core times the root of what stands above it; and by axes, what takes that off, and the metric."""
        if self.up is None or above is None:
            return self.core, self.opened
        squares, vectors = torch.linalg.eigh(above)
        roots = (squares.clamp_min(0) + _WEAKEST**2 * squares[-1]).sqrt()
        if float(roots[-1]) <= 0:
            return self.core, self.opened
        weighed = multiply((vectors * roots) @ vectors.T, self.core, self.up)
        return weighed, {self.up: (vectors / roots) @ vectors.T, **self.opened}


@dataclass(frozen=True, eq=False)
class _Stored:
    """From the values of a stored core to the core: products along axes, a number and a shape."""

    along: dict[int, Float[Tensor, "n n"]]
    size: float
    shape: torch.Size

    def to(self, dtype: torch.dtype) -> _Stored:
        """The same in another precision."""
        return replace(self, along={axis: by.to(dtype) for axis, by in self.along.items()})

    def core(self, values: Tensor) -> Tensor:
        """The core of values."""
        core = values * self.size
        for axis, by in self.along.items():
            core = multiply(by, core, axis)
        return core.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Coordinates(Generic[Stored]):
    """The stored cores of a matrix by other numbers.

    Attributes:
        start: the matrix.
        values: its coordinates, a tensor of norm one for each stored core.
    """

    start: Stored
    values: tuple[Tensor, ...]
    _cores: tuple[_Stored | Core, ...]

    @classmethod
    def of(cls, start: Stored, metric: Metric) -> Coordinates[Stored]:
        """The coordinates of a network of cores in the metric of its modes, in float64.

        Where bonds close a ring they are cut open, and a bond of more than two cores is taken for a mode: there what is
        said of frames holds nearly.
        """
        network = start.network
        if network is None:
            raise RuntimeError("Only cores that hang together have coordinates.")
        places = _turned(start, network, _triangles(metric, network.layout))
        above = _above(places)
        cores: list[_Stored | Core] = []
        values = []
        for t, (core, full) in enumerate(zip(start.cores, start.operands(), strict=True)):
            place = places[t]
            if isinstance(core, Tensor):
                own, along = place.weighed(above.get(t))
                size = float(torch.linalg.vector_norm(own)) or 1.0
                values.append(own / size)
                cores.append(_Stored(along, size, full.shape))
            elif place.up is not None and not place.opened:
                cores.append(core)
            else:
                cores.append(_Stored(place.opened, 1.0, full.shape).core(place.core))
        return cls(start, tuple(values), tuple(cores))

    def to(self, dtype: torch.dtype) -> Coordinates[Stored]:
        """The same in another precision."""
        cores = (core if isinstance(core, Identity) else core.to(dtype) for core in self._cores)
        return replace(self, values=tuple(own.to(dtype) for own in self.values), _cores=tuple(cores))

    def matrix(self, values: Sequence[Tensor]) -> Stored:
        """The matrix of other values. Its frames are others than those of the start: identities may be written out."""
        given = iter(values)
        return self.start.with_cores(
            [core.core(next(given)) if isinstance(core, _Stored) else core for core in self._cores]
        )


def _triangles(metric: Metric, layout: Layout) -> dict[str, Triangle]:
    """The metric's factors for the modes of a layout, by the names of their axes."""
    rows = {f"m{k}": size for k, size in enumerate(layout.row_modes) if size > 1}
    cols = {f"n{k}": size for k, size in enumerate(layout.col_modes) if size > 1}
    found = [*zip(rows, metric.row_triangles([*rows.values()]), strict=False)]
    found += zip(cols, metric.col_triangles([*cols.values()]), strict=False)
    return dict(found)


def _order(start: StoredMatrix, network: Network) -> list[int]:
    """The cores, each before the one above it: as they stand, but for a last one that is stored.

    At the top there is no frame to be orthonormal: an error there counts as it is.
    """
    order = list(range(len(network.legs)))
    stored = [isinstance(core, Tensor) for core in start.cores]
    if not stored[-1]:
        beside = [t for t in order[:-1] if stored[t] and set(network.legs[t]) & set(network.legs[-1])]
        order = [t for t in order if t not in beside[:1]] + beside[:1]
    return order


def _links(network: Network, order: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """Of a core the axis to one that comes after it, which that is, and its axis; the nearest of them."""
    ends: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for t in order:
        for axis, (leg, size) in enumerate(zip(network.legs[t], network.shapes[t], strict=True)):
            if size > 1:
                ends[leg].append((t, axis))
    links: dict[int, tuple[int, int, int]] = {}
    place = {t: k for k, t in enumerate(order)}
    for pair in ends.values():
        if len(pair) == 2:
            (first, axis), (second, other) = pair
            if first not in links or place[second] < place[links[first][1]]:
                links[first] = axis, second, other
    return links


def _turned(start: StoredMatrix, network: Network, triangles: dict[str, Triangle]) -> dict[int, _Place]:
    """The cores with the metric in them, every frame orthonormal up to the last; each before the one above it."""
    cores = [core.double().reshape(shape) for core, shape in zip(start.operands(), network.shapes, strict=True)]
    whole, order = list(cores), _order(start, network)
    links = _links(network, order)
    places = {}
    for t in order:
        core, opened = cores[t], {}
        for axis, leg in enumerate(network.legs[t]):
            if leg in triangles:
                core = multiply(triangles[leg].transposed, core, axis)
                opened[axis] = triangles[leg].inverse
        if t not in links or core.numel() < core.shape[links[t][0]] ** 2:
            # A frame of more columns than rows is not orthonormal.
            places[t] = _Place(core, opened)
            continue
        up, above, axis = links[t]
        moved = core.movedim(up, -1)
        flat = moved.reshape(-1, moved.shape[-1])
        if isinstance(start.cores[t], Tensor):
            frame, rest = torch.linalg.qr(flat)
            core = frame.reshape(moved.shape).movedim(-1, up)
        else:
            # What is an identity stays one.
            core, rest = whole[t], flat
        cores[above] = multiply(rest, cores[above], axis)
        places[t] = _Place(core, opened, up, (above, axis))
    return places


def _above(places: dict[int, _Place]) -> dict[int, Float[Tensor, "r r"]]:
    """The Gram matrix of what stands above a core, where the frames beside it are orthonormal."""
    found: dict[int, Tensor] = {}
    wholes: dict[int, Tensor] = {}
    for t, place in reversed(places.items()):
        wholes[t] = place.core
        if place.up is not None and place.above is not None:
            other, axis = place.above
            whole, core = (core.movedim(axis, 0).flatten(1) for core in (wholes[other], places[other].core))
            found[t] = whole @ core.T
            wholes[t] = multiply(found[t], place.core, place.up)
    return found

"""Sequential projection: one mode of a tensor after the other cut to its leading singular subspace.

Bases come from Gram matrices, and from QR where the tolerance is finer than those can tell: squaring loses all below
1e-8 of the norm. A large tensor is read in chunks, in whatever order its numbers lie: a mode may be several axes of a
view (a row and a column mode of a matrix), and no permuted copy of the whole is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log, prod
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.tensor.pieces import CHUNK, Flattener, Unfolded, pieces
from htcompress.tensor.tree import Node

_GRAM_LIMIT = 3000  # the largest Gram matrix that is formed where a few directions are wanted
_PASS = 5  # what reading and writing a number costs, in multiplications
_UNKNOWN = 4  # how much a mode is taken to shrink where only an error is asked for
OVERSAMPLE = 16
"""Directions iterated beyond those that are wanted, of which the last are the least exact (Halko et al. 2011)."""
_ROUNDING = 3e-8  # of the largest: singular values below it are the square roots of float64's rounding

Axes = tuple[int, ...]


@dataclass
class Projection:
    """The state of a sequential projection.

    Args:
        x: the tensor, any strides.
        modes: for each mode the axes of `x` that make it up, in order; the last one the fastest.
        cap: no edge keeps more ranks than this.
        tail: the part of the squared norm that each edge may lose.
        fine: compute in float64.
        squaring: whether Gram matrices are exact enough for the tail; else bases come from QR.

    Attributes:
        discarded: the squared norm that was cut off.
    """

    x: Tensor
    modes: list[Axes]
    cap: int | None
    tail: float
    fine: bool
    squaring: bool = True
    discarded: float = 0.0
    _squared: float | None = field(default=None, init=False)

    @property
    def squared(self) -> float:
        """The squared norm of the tensor as it was given."""
        if self._squared is None:
            found = sum(float(part.double().square().sum()) for (part,) in pieces([self.x], self.x.ndim))
            self._squared = found + self.discarded
        return self._squared

    def size(self, mode: int) -> int:
        """How long a mode is."""
        return prod(self.x.shape[axis] for axis in self.modes[mode])

    def next_of(self, modes: Sequence[int]) -> int:
        """The mode that shrinks the tensor most for what it costs; modes longer than all others come last."""

        def cost(mode: int) -> tuple[bool, float]:
            size = self.size(mode)
            kept = min(size, self.cap) if self.cap else max(1, size // _UNKNOWN)
            work = size + kept + _PASS
            return size > self.x.numel() // max(1, size), work / log(size / kept) if kept < size else float("inf")

        return min(modes, key=cost)

    def cut(self, mode: int, *, exact: bool = False) -> Tensor:
        """Project one mode; its orthonormal basis (n, r). `exact`: only the cap may cut."""
        n = self.size(mode)
        tail = 0.0 if exact else self.tail
        limit = min(n, self.x.numel() // max(1, n), self.cap or n)
        dtype = torch.float64 if self.fine else self.x.dtype
        if limit == n and tail == 0.0:
            return torch.eye(n, dtype=dtype, device=self.x.device)
        if limit == self.x.numel() // max(1, n) and tail == 0.0:
            # Nothing is to be cut: any basis of all columns does.
            basis = torch.linalg.qr(self._unfolding(mode).double())[0].to(dtype)
            self.apply(mode, basis)
            return basis
        basis, squares, beyond = self._leading(mode, limit)
        # What is lost beyond each rank, summed from its small end: a tiny tail is then no rounding of the total.
        tails = beyond + torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        if self._squared is None:
            self._squared = float(tails[0]) + self.discarded
        rank = max(1, min(limit, len(squares), int((tails > tail * self._squared).sum())))
        self.discarded += float(tails[rank])
        basis = basis[:, :rank].to(dtype)
        self.apply(mode, basis)
        return basis

    def merge(self, left: int, right: int) -> None:
        """Make one mode, the first, of two; the order of the others stays."""
        self._fold()
        rest = [mode for mode in range(len(self.modes)) if mode not in (left, right)]
        sizes = [self.x.shape[mode] for mode in rest]
        self.x = self.x.permute(left, right, *rest).reshape(-1, *sizes)
        self.modes = [(mode,) for mode in range(len(sizes) + 1)]

    def _leading(self, mode: int, limit: int) -> tuple[Tensor, Tensor, float]:
        """Leading directions of a mode, their squared singular values, and the squared norm of all further ones."""
        n = self.size(mode)
        rest = self.x.numel() // n
        if not self.squaring:
            basis, values = self._by_qr(mode)
            return basis, values.square(), 0.0
        if min(n, rest) > _GRAM_LIMIT and limit + OVERSAMPLE < min(n, rest) // 4:
            unfolding = self._unfolding(mode)
            vectors, squares = leading_left(unfolding.double() if self.fine else unfolding, limit + OVERSAMPLE)
            total = float(sum(part.double().square().sum() for part in unfolding.split(64)))
            return vectors, squares, max(0.0, total - float(squares.sum()))
        if n <= rest:
            squares, vectors = eigh(self.gram(mode))
            return vectors, squares, 0.0
        # The other side is the shorter one: its directions, carried over.
        parts = self._unfolding(mode).split(max(1, CHUNK // rest))
        gram = torch.zeros(rest, rest, dtype=torch.float64, device=self.x.device)
        for part in parts:
            gram += part.double().T @ part.double()
        squares, vectors = eigh(gram)
        carried = torch.cat([part.double() @ vectors[:, :limit] for part in parts])
        return torch.linalg.qr(carried)[0], squares, 0.0

    def _by_qr(self, mode: int) -> tuple[Tensor, Tensor]:
        """Directions of a mode and their singular values, as exact as float64 is."""
        n = self.size(mode)
        if n >= self.x.numel() // n:
            return left_singular(self._unfolding(mode).double())
        view, others = self._aside(mode)
        flatten = Flattener(len(others), n, torch.float64, self.x.device)
        triangle = torch.empty(0, n, dtype=torch.float64, device=self.x.device)
        waiting: list[Tensor] = []
        for (part,) in pieces([view], len(others)):
            waiting.append(flatten(part).T.clone())
            # A QR of few rows more than the triangle has would be spent on the triangle.
            if sum(map(len, waiting)) >= 4 * n:
                triangle, waiting = torch.linalg.qr(torch.cat([triangle, *waiting]), mode="r")[1], []
        return left_singular(torch.cat([triangle, *waiting]).T)

    def _unfolding(self, mode: int) -> Tensor:
        view, _ = self._aside(mode)
        return view.reshape(-1, self.size(mode)).T

    def _aside(self, mode: int) -> tuple[Tensor, list[int]]:
        """The tensor with the axes of a mode last, and the other axes, as they lie in memory, outermost first."""
        own = self.modes[mode]
        strides = self.x.stride()
        others = sorted((axis for axis in range(self.x.ndim) if axis not in own), key=lambda axis: -strides[axis])
        return self.x.permute(*others, *own), others

    def gram(self, mode: int) -> Tensor:
        """The Gram matrix of a mode, in float64."""
        n = self.size(mode)
        view, others = self._aside(mode)
        total = torch.zeros(n, n, dtype=torch.float64, device=self.x.device)
        flatten = Flattener(len(others), n, torch.float64 if self.fine else self.x.dtype, self.x.device)
        for (part,) in pieces([view], len(others)):
            flat = flatten(part)
            total += flat @ flat.T
        return total

    def apply(self, mode: int, basis: Tensor) -> None:
        """Multiply the transposed basis (n, r) into a mode; the result is folded: one axis for each mode."""
        n, rank = basis.shape
        view, others = self._aside(mode)
        # The result, seen with the axes of the input: written to in the order in which the input is read.
        shapes = [[rank] if k == mode else [self.x.shape[a] for a in axes] for k, axes in enumerate(self.modes)]
        result = torch.empty([prod(shape) for shape in shapes], dtype=basis.dtype, device=self.x.device)
        place = {axis: at for at, axis in enumerate(self._flat_axes(mode))}
        seen = result.view([size for shape in shapes for size in shape])
        seen = seen.permute(*(place[axis] for axis in others), place[-1])
        flatten = Flattener(len(others), n, basis.dtype, self.x.device)
        for part, target in pieces([view, seen], len(others)):
            flat = flatten(part)
            if target.stride(-1) == 1:
                target.copy_((flat.T @ basis).view(target.shape))
            else:
                aside = target.movedim(-1, 0)
                aside.copy_((basis.T @ flat).view(aside.shape))
        self.x, self.modes = result, [(k,) for k in range(len(self.modes))]

    def _flat_axes(self, mode: int) -> list[int]:
        """The axes mode by mode; -1 stands for all of one mode's."""
        return [axis for k, axes in enumerate(self.modes) for axis in ((-1,) if k == mode else axes)]

    def _fold(self) -> None:
        """One axis for each mode."""
        if any(len(axes) > 1 for axes in self.modes) or self.modes != [(k,) for k in range(len(self.modes))]:
            sizes = [self.size(mode) for mode in range(len(self.modes))]
            self.x = self.x.permute([axis for axes in self.modes for axis in axes]).reshape(sizes)
            self.modes = [(k,) for k in range(len(sizes))]


def project(state: Projection, nodes: Sequence[Node]) -> list[Tensor]:
    """The cores of a tree's nodes for a tensor whose modes are the tree's leaves in increasing order.

    Leaves first, each cut as soon as it is cheapest, then the inner nodes from below; the root holds the rest.
    """
    top = nodes[-1]
    if top.is_leaf:
        return [state.x.reshape(-1, 1).clone()]
    axes = [node for node in sorted(nodes, key=lambda n: n.leaves) if node.is_leaf]
    siblings = {a: b for left, right in [top.children or (0, 0)] for a, b in ((left, right), (right, left))}
    cores: dict[int, Tensor] = {}

    def shrink(node: Node) -> None:
        # The two edges below the root are one: what the first has cut is not cut again at the second.
        again = node.parent == top.index and siblings[node.index] in cores
        cores[node.index] = state.cut(axes.index(node), exact=again)

    waiting = list(axes)
    while waiting:
        leaf = axes[state.next_of([axes.index(node) for node in waiting])]
        waiting.remove(leaf)
        shrink(leaf)
    by_index = {node.index: node for node in nodes}
    for node in nodes:
        if node.children is None:
            continue
        pair = [axes.index(by_index[child]) for child in node.children]
        sizes = [state.size(mode) for mode in pair]
        state.merge(*pair)
        axes = [node, *(other for mode, other in enumerate(axes) if mode not in pair)]
        if node is top:
            cores[node.index] = state.x.reshape(*sizes, 1)
        else:
            shrink(node)
            cores[node.index] = cores[node.index].reshape(*sizes, -1)
    return [cores[node.index] for node in nodes]


def edge_spectra(x: Tensor, nodes: Sequence[Node], caps: Sequence[int], most: int | None = None) -> list[Tensor]:
    """The singular values, descending, of the unfoldings whose rows are the axes below some nodes of a tree.

    Args:
        x: the tensor; its axes are the tree's leaves.
        nodes: leaves and inner nodes.
        caps: for each leaf the ranks that anybody will ask for. Longer axes are projected to so many before the
            inner nodes are looked at, whose values then miss what those ranks do.
        most: of inner nodes; where both sides are long, no more values are found. None: all.

    Those that are rounding of the Gram matrix are dropped, but for the first.
    """
    found: dict[int, Tensor] = {}
    state = Projection(x, [(k,) for k in range(x.ndim)], None, 0.0, fine=x.dtype == torch.float64)
    for node in sorted(nodes, key=lambda node: len(node.leaves)):
        if len(node.leaves) > 1:
            rest = tuple(axis for axis in range(x.ndim) if axis not in node.leaves)
            sides = Projection(state.x, [node.leaves, rest], None, 0.0, fine=state.fine)
            shorter = 0 if sides.size(0) <= sides.size(1) else 1
            wanted = sides.size(shorter) if most is None else most + OVERSAMPLE
            if sides.size(shorter) > _GRAM_LIMIT and wanted < sides.size(shorter) // 4:
                squares = leading_left(Unfolded(*sides._aside(shorter)), wanted)[1][:most]
            else:
                squares = torch.linalg.eigvalsh(sides.gram(shorter)).flip(0)
        else:
            (leaf,) = node.leaves
            if state.size(leaf) <= caps[leaf]:
                squares = torch.linalg.eigvalsh(state.gram(leaf)).flip(0)
            else:
                squares, vectors = eigh(state.gram(leaf))
                state.apply(leaf, vectors[:, : caps[leaf]].to(x.dtype))
        values = squares.clamp_min(0).sqrt()
        found[node.index] = values[: max(1, int((values > _ROUNDING * values[0]).sum()))]
    return [found[node.index] for node in nodes]


class Product(Protocol):
    """A matrix that is known by its products."""

    @property
    def shape(self) -> tuple[int, int] | torch.Size:
        """Rows and columns."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""

    @property
    def device(self) -> torch.device:
        """Of the products."""

    @property
    def T(self) -> Any:  # noqa: N802 - as tensors have it
        """The transposed."""

    def __matmul__(self, other: Tensor) -> Tensor: ...


def leading_left(matrix: Tensor | Product, size: int, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors (n, size) and squared singular values, by randomised subspace iteration.

    Seeded by itself, so that a decomposition is repeatable and no global state is touched.
    Source: Halko, Martinsson, Tropp 2011, algorithm 4.4.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float32, device="cpu")
    start = start.to(device=matrix.device, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    small = (matrix.T @ basis).T.double()
    squares, rotation = eigh(small @ small.T)
    return basis.double() @ rotation, squares


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a Gram matrix, descending and not below zero, and its eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def left_singular(matrix: Float[Tensor, "n m"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Left singular vectors and singular values, r = min(n, m), by QR and the SVD of its triangle."""
    if matrix.shape[1] > matrix.shape[0]:
        matrix = torch.linalg.qr(matrix.T, mode="r")[1].T
        vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return vectors, values
    basis, small = torch.linalg.qr(matrix)
    vectors, values, _ = torch.linalg.svd(small)
    return basis @ vectors, values

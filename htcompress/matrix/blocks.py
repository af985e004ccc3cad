"""A matrix as blocks of columns side by side, none of them copied.

One layer's weights are looked at as several matrices: W_ih, W_hh, [W_ih | W_hh], [W_ih | W_hh | b]. What is costly
to find out about a block is found once and kept with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from htcompress.side_by_side import cached_property

DOUBLED = 1 << 22
"""Numbers up to which a matrix is worked on in float64."""

_CHUNK = 1 << 20
"""Numbers that are looked at at a time: a chunk and its float64 copy stay in the caches of a core."""
_ROWS = 128  # of a Gram matrix, computed at a time

LARGE = 1 << 24
"""Numbers of a thin factor from which it is worked on a few rows at a time, and not kept: 64 MB in float32."""


_RANGE = 1e-15, 1e15
"""Where the largest number of a matrix may lie, so that sums of squares stay within the range of float32."""


def working(tensor: Tensor) -> Tensor:
    """A matrix in the precision it is worked on in: float64 where it is small, float32 where it is large.

    Float64, too, where the squares of a large one would leave the range of float32.
    """
    return tensor.float() if tensor.numel() > DOUBLED and in_range(tensor) else tensor.double()


def in_range(tensor: Tensor) -> bool:
    """Whether float32 is wide enough for the squares of a matrix."""
    largest = max(abs(float(bound)) for bound in torch.aminmax(tensor.detach()))
    return largest == 0.0 or _RANGE[0] <= largest <= _RANGE[1]


def thin_product(matrix: Float[Tensor, "n m"], factor: Float[Tensor, "m r"]) -> Float[Tensor, "n r"]:
    """M C for a C of few columns: up to ten times faster on a CPU than written as it stands."""
    return (factor.T @ matrix.T).T


def _product(matrix: Float[Tensor, "n m"], factor: Float[Tensor, "m r"]) -> Float[Tensor, "n r"]:
    """M C in the matrix's precision, given in the factor's, whose range may be wider."""
    if factor.dtype != torch.float64 or matrix.dtype == torch.float64:
        return thin_product(matrix, factor.to(matrix.dtype)).to(factor.dtype)
    unit = float(factor.detach().abs().max()) or 1.0
    return thin_product(matrix, (factor / unit).to(matrix.dtype)).to(factor.dtype) * unit


class Block:
    """Columns of a matrix (rows, cols), with what was found out about them.

    Args:
        lying: the numbers as they lie in memory.
        order: which of their rows is which of the block's; None: each its own. Nothing is copied for it.
    """

    def __init__(self, lying: Float[Tensor, "rows cols"], order: Int[Tensor, " rows"] | None = None) -> None:
        self.lying, self.order = lying.detach(), order
        self._products: list[tuple[Block, Tensor]] = []

    @property
    def tensor(self) -> Float[Tensor, "rows cols"]:
        """The block; a copy where its rows have an order."""
        return self._ordered(self.lying)

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        return self.lying.shape

    def _ordered(self, lying: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        return lying if self.order is None else lying[self.order]

    @cached_property
    def work(self) -> Float[Tensor, "rows cols"]:
        """The numbers as they lie, in the precision that they are worked on in."""
        return working(self.lying)

    @cached_property
    def gram(self) -> Float[Tensor, "rows rows"]:
        """B B^T in float64."""
        return self._ordered(self._ordered(chunked_gram(self.work)).T)

    def pieces(self, most: int) -> Iterator[Float[Tensor, "rows c"]]:
        """The block, at most so many columns at a time."""
        for piece in self.lying.split(most, dim=1):
            yield self._ordered(piece)

    def times(self, factor: Float[Tensor, "cols r"], where: slice = slice(None)) -> Float[Tensor, "rows r"]:
        """B C, in the factor's precision, or that of some columns."""
        return self._ordered(_product(self.work[:, where], factor))

    def transposed(self, factor: Float[Tensor, "rows r"], where: slice = slice(None)) -> Float[Tensor, "cols r"]:
        """B^T R, in the factor's precision, or some rows of it."""
        back = factor if self.order is None else factor[torch.argsort(self.order)]
        return _product(self.work[:, where].T, back)

    @cached_property
    def inner(self) -> Float[Tensor, "cols cols"]:
        """B^T B in float64."""
        return chunked_gram(self.work.T)

    def times_block(self, other: Block) -> Float[Tensor, "rows n"]:
        """The product with another block, in float64."""
        for known, product in self._products:
            if known is other:
                return product
        both_small = self.work.dtype == other.work.dtype == torch.float64
        dtype = torch.float64 if both_small else torch.float32
        product = self._ordered((self.work.to(dtype) @ other.work.to(dtype)).double())
        self._products.append((other, product))
        return product


class Blocks:
    """A matrix (rows, cols) made of blocks of columns."""

    def __init__(self, parts: Sequence[Block]) -> None:
        self.parts = tuple(parts)
        self.shape = parts[0].shape[0], sum(part.shape[1] for part in parts)

    @classmethod
    def of(cls, matrix: Float[Tensor, "rows cols"] | Blocks) -> Blocks:
        """A matrix that is one block."""
        return matrix if isinstance(matrix, Blocks) else cls([Block(matrix)])

    @property
    def sizes(self) -> list[int]:
        """The columns of each block."""
        return [part.shape[1] for part in self.parts]

    def numel(self) -> int:
        """How many numbers it holds."""
        return self.shape[0] * self.shape[1]

    def dense(self) -> Float[Tensor, "rows cols"]:
        """The matrix as one tensor; a copy where it has several blocks."""
        tensors = [part.tensor for part in self.parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)

    def times(self, factor: Float[Tensor, "cols r"]) -> Float[Tensor, "rows r"]:
        """W C, in the factor's precision."""
        if factor.numel() > LARGE:
            total = factor.new_zeros(self.shape[0], factor.shape[1])
            for part, where, own in self._steps(factor.shape[1]):
                total += part.times(factor[where], own)
            return total
        pieces = zip(self.parts, factor.split(self.sizes), strict=True)
        return torch.stack([part.times(piece) for part, piece in pieces]).sum(0)

    def transposed(self, factor: Float[Tensor, "rows r"]) -> Float[Tensor, "cols r"]:
        """W^T R, in the factor's precision."""
        if self.shape[1] * factor.shape[1] > LARGE:
            made = factor.new_empty(self.shape[1], factor.shape[1])
            for part, where, own in self._steps(factor.shape[1]):
                made[where] = part.transposed(factor, own)
            return made
        return torch.cat([part.transposed(factor) for part in self.parts])

    def gram(self) -> Float[Tensor, "rows rows"]:
        """W W^T, in float64."""
        return torch.stack([part.gram for part in self.parts]).sum(0)

    def _steps(self, width: int) -> Iterator[tuple[Block, slice, slice]]:
        """So few columns at a time that factors of a width are small: whose, which they are, and which of its own."""
        start, most = 0, max(1, _CHUNK // width)
        for part in self.parts:
            cols = part.shape[1]
            for own in range(0, cols, most):
                end = min(own + most, cols)
                yield part, slice(start + own, start + end), slice(own, end)
            start += cols

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "rows c"]]]:
        """The matrix in float64, a few columns at a time, and which they are."""
        start = 0
        for part in self.parts:
            for piece in part.pieces(max(1, _CHUNK // self.shape[0])):
                yield slice(start, start + piece.shape[1]), piece.double()
                start += piece.shape[1]


def chunked_gram(matrix: Float[Tensor, "n m"]) -> Float[Tensor, "n n"]:
    """M M^T, summed in float64 over chunks of columns; of what is symmetric one half is computed."""
    n = len(matrix)
    total = torch.zeros(n, n, dtype=torch.float64, device=matrix.device)
    for part in matrix.split(max(1, _CHUNK // max(1, n)), dim=1):
        for start in range(0, n, _ROWS):
            rows = slice(start, start + _ROWS)
            total[rows, : start + _ROWS] += part[rows] @ part[: start + _ROWS].T
    return total.tril() + total.tril(-1).T

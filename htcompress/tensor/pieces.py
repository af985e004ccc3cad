"""A large tensor read a few numbers at a time, in the order in which they lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

CHUNK = 1 << 19
"""Numbers that are worked on at a time."""


class Flattener:
    """A mode's unfoldings (n, rest) of parts whose last axes are the mode; what must be copied shares one buffer."""

    def __init__(self, others: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.others, self.n = others, n
        self.buffer = torch.empty(0, dtype=dtype, device=device)

    def __call__(self, part: Tensor) -> Tensor:
        if part.stride(-1) == 1:
            return self._written(part, (-1, self.n)).T
        # The mode first: copied along longer runs.
        first = part.permute(*range(self.others, part.ndim), *range(self.others))
        return self._written(first, (self.n, -1))

    def _written(self, part: Tensor, shape: tuple[int, int]) -> Tensor:
        if part.dtype == self.buffer.dtype:
            try:
                return part.view(shape)
            except RuntimeError:  # its strides allow no view
                pass
        if self.buffer.numel() < part.numel():
            self.buffer = self.buffer.new_empty(part.numel())
        copied = self.buffer[: part.numel()].view(part.shape)
        return copied.copy_(part).view(shape)


def pieces(tensors: Sequence[Tensor], axes: int, at: int = 0) -> Iterator[Sequence[Tensor]]:
    """Tensors of equal first `axes` cut along those into parts of a chunk's numbers (of the first tensor)."""
    first = tensors[0]
    if at == axes or first.numel() <= CHUNK:
        yield tensors
        return
    size = first.shape[at]
    step = max(1, CHUNK // max(1, first.numel() // size))
    for start in range(0, size, step):
        count = min(step, size - start)
        yield from pieces([tensor.narrow(at, start, count) for tensor in tensors], axes, at + 1)


class Unfolded:
    """The unfolding (n, rest) of a mode by its products, a few columns at a time: no permuted copy of it is made.

    Args:
        view: a tensor with the axes of the mode last.
        others: its other axes.
    """

    def __init__(self, view: Tensor, others: Sequence[int]) -> None:
        self.view, self.others = view, len(others)
        rest = prod(view.shape[: self.others])
        self.shape = view.numel() // max(1, rest), rest
        self.dtype, self.device = view.dtype, view.device

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        flatten, start = Flattener(self.others, self.shape[0], self.dtype, self.device), 0
        for (part,) in pieces([self.view], self.others):
            flat = flatten(part)
            yield slice(start, start + flat.shape[1]), flat
            start += flat.shape[1]

    def __matmul__(self, other: Tensor) -> Tensor:
        total = other.new_zeros(self.shape[0], other.shape[1])
        for where, flat in self._parts():
            total += flat @ other[where]
        return total

    def transposed(self, other: Tensor) -> Tensor:
        """The product of the transposed and another matrix."""
        made = other.new_empty(self.shape[1], other.shape[1])
        for where, flat in self._parts():
            made[where] = flat.T @ other
        return made

    @property
    def T(self) -> Transposed:  # noqa: N802 - as tensors have it
        return Transposed(self.transposed)


@dataclass(frozen=True)
class Transposed:
    """The transposed of a matrix that is known by its products."""

    times: Callable[[Tensor], Tensor]

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.times(other)

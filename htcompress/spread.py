"""How far numbers are spread: the unit of every difference between two models' answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.values import answered

_ROWS = 8
"""Of how many numbers the variance of a channel is taken for more than chance."""

_CHANNELS = 4096
"""More than that are a vocabulary, all of one unit."""

_UNITS = 1e-10, 1e-2
"""What is within channels, as a part of the whole variance, where their means tell of units and not of answers. Below
the first there is rounding alone."""

_UNLIKE = 100.0
"""How many times the smallest unit of an output the largest is from which on they are told apart: states of one layer
differ by ten."""

_NOISE = 1e-6
"""Of a mean, or of the largest scale: what varies less is rounding, and in no unit of its own."""

_CHUNK = 1 << 20
"""Numbers that are looked at at a time."""

_SEEN = 1 << 20
"""Numbers of an output, at most, by which its units are told."""


def scales_of(
    rows: Float[Tensor, "n channels"], known: Tensor | None = None
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """The scale of every channel, and its variance, in float64; both 0 where it is constant but for rounding.

    The scale is sqrt(E d^4 / E d^2), with d the difference from the mean: the size that numbers have where they vary,
    which is 1 for a flag, however rare, and about the standard deviation for a measurement.

    Args:
        known: which of the numbers count; all if None.
    """
    counts = torch.full((rows.shape[1],), len(rows)) if known is None else known.sum(0)
    counts = counts.clamp_min(1).to(torch.float64)
    total = rows if known is None else torch.where(known, rows, 0.0)
    mean = total.sum(0, dtype=torch.float64) / counts
    square, fourth = torch.zeros_like(mean), torch.zeros_like(mean)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        apart = (rows[start : start + step].double() - mean).square()
        if known is not None:
            apart = torch.where(known[start : start + step], apart, 0.0)
        square += apart.sum(0)
        fourth += apart.square().sum(0)
    varies = square > _NOISE**2 * counts * mean.square()
    scale = (fourth / square.clamp_min(1e-300)).sqrt()
    return torch.where(varies, scale, 0.0), torch.where(varies, square / counts, 0.0)


def units_of(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The units of outputs, of each or channel by channel, in float32 on the CPU; None where all are in one.

    The unit of a channel is its scale, see `scales_of`. Probabilities are in one unit, whichever are rare.
    """
    found = []
    for tensor in tensors:
        apart = tensor.ndim > 1 and tensor.shape[-1] <= _CHANNELS and tensor.numel() >= _ROWS * tensor.shape[-1]
        rows = tensor.detach().reshape(-1, tensor.shape[-1] if apart else 1)
        rows = rows[:: max(1, rows.numel() // _SEEN)].to("cpu", torch.float64)
        if bool(((rows >= 0) & (rows <= 1)).all()):
            rows = rows.reshape(-1, 1)
        found.append(scales_of(rows, answered(rows))[0])
    every = torch.cat(found) if found else torch.zeros(0)
    every = every[every > _NOISE * every.max()] if len(every) else every
    if not len(every) or float(every.max()) < _UNLIKE * float(every.min()):
        return [None] * len(found)
    return [torch.where(scale >= every.min(), scale, every.max()).float() for scale in found]


@dataclass(frozen=True, eq=False)
class Spread:
    """Answers (see `answered`) channel by channel, in float64 on the CPU.

    Attributes:
        counts: how many there are.
        means: their means.
        squares: the sums of their squared distances from these.
    """

    counts: Float[Tensor, " channels"]
    means: Float[Tensor, " channels"]
    squares: Float[Tensor, " channels"]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], known: Tensor | None = None) -> Spread:
        """That of the numbers of some tensors, whose last axis is the channels where it is of one size.

        Args:
            known: which of all their numbers, one after the other, are answers, where that has been found out.
        """
        widths = {t.shape[-1] if t.ndim > 1 else 1 for t in tensors if t.numel()}
        width = widths.pop() if len(widths) == 1 and max(widths) <= _CHANNELS else 1
        if not tensors:
            return cls(*torch.zeros(3, width, dtype=torch.float64))
        rows = torch.cat([t.detach().reshape(-1, width) for t in tensors])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        known = answered(rows) if known is None else known.reshape(rows.shape)
        counts = known.sum(0).clamp_min(1)
        means = torch.where(known, rows, 0.0).sum(0, dtype=torch.float64) / counts
        apart = torch.where(known, rows - means.to(rows.dtype), 0.0)
        # Squares of the least numbers of float32 are beyond it.
        unit = float(apart.abs().max()) if apart.numel() else 0.0
        squares = (apart / (unit or 1.0)).square().sum(0, dtype=torch.float64) * unit**2
        return cls(*(t.to("cpu", torch.float64) for t in (known.sum(0), means, squares)))

    @property
    def count(self) -> int:
        """How many there are in all channels."""
        return int(self.counts.sum())

    @property
    def whole(self) -> Spread:
        """All of them as one channel."""
        count = self.counts.sum().clamp_min(1)
        mean = (self.counts * self.means).sum() / count
        squares = self.squares.sum() + (self.counts * (self.means - mean).square()).sum()
        return Spread(*(t.reshape(1) for t in (self.counts.sum(), mean, squares)))

    @property
    def variance(self) -> float:
        """The mean squared distance from the mean of all, or from that of each channel.

        The latter where nearly all of the former is the distance of the channels from each other: of a pressure in
        pascals beside a humidity, say, which is not what a model has learnt.
        """
        count = max(1, self.count)
        whole, within = float(self.whole.squares) / count, float(self.squares.sum()) / count
        rounding, units = (part * whole for part in _UNITS)
        return within if float(self.counts.max()) >= _ROWS and rounding < within < units else whole

    def joined(self, other: Spread) -> Spread:
        """That of both together (Chan et al. 1979, Updating formulae for computing sample variances)."""
        if not (self.count and other.count):
            return self if self.count else other
        if self.counts.shape != other.counts.shape:
            return self.whole.joined(other.whole)
        counts = self.counts + other.counts
        apart, part = other.means - self.means, other.counts / counts.clamp_min(1)
        return Spread(
            counts, self.means + apart * part, self.squares + other.squares + apart.square() * self.counts * part
        )

"""Numbers as whole multiples of a scale, in 2 to 8 bits each, packed.

The 2^b levels lie symmetrically about zero and do not hold it: (code + 1/2 - 2^(b-1)) * scale. Of numbers that are
spread like a normal distribution two bits of such levels lose 12 % of the square, where levels with zero among them
lose 19 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from htcompress.storage.codec import Codec
from htcompress.storage.packing import packed, packed_bytes, unpacked

_CLIPS, _FINER = 16, 3
"""Scales that are tried, from that which cuts nothing off down to a sixth of it, and then on either side of the best:
that is flat to a few percent."""

_LEAST_CLIP = 1 / 6

_SCALE = torch.bfloat16
"""Of scales: float32's range, and which grid is rounded to is known all the same. What is kept of them beside a core
are their bits, as int16: no change of a model's precision touches those."""


@dataclass(frozen=True)
class Integer(Codec):
    """Codes of `width` bits, 2 to 8, with a scale for the whole core, or `by_rows` one for each row: its first axis."""

    width: int
    by_rows: bool = False

    @property
    def name(self) -> str:
        return f"int{self.width}"

    @property
    def bits(self) -> int:
        return self.width

    def scales(self, core: Tensor) -> Tensor:
        """Those that lose least of a core in the square, (1,) or (rows,)."""
        return kept(best_scales(self.grouped(core.detach()).double(), self.width)).cpu()

    def encode(self, core: Tensor, scales: Tensor | None = None) -> dict[str, Tensor]:
        own = self.scales(core) if scales is None else scales
        levels = nearest(self.grouped(core.detach()).double() / column(own, core), self.width)
        codes = (levels + (1 << self.width - 1) - 0.5).to(torch.uint8)
        return {"": packed(codes, self.width), "scales": own.cpu().view(_SCALE)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        if parts[""].dtype is not torch.uint8:
            raise ValueError(f"codes of {self.width} bits are packed in bytes, not stored as {parts[''].dtype}")
        codes = unpacked(parts[""], self.width, torch.Size(shape).numel()).reshape(shape)
        levels = self.grouped(codes.double() - (1 << self.width - 1) + 0.5)
        return (levels * column(kept(parts["scales"]), levels)).reshape(shape).to(torch.float32)

    def rounded(self, core: Tensor, scales: Tensor | None = None) -> Tensor:
        steps = column(self.scales(core) if scales is None else scales, core)
        return (nearest(self.grouped(core).double() / steps, self.width) * steps).reshape(core.shape).to(core.dtype)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"": (packed_bytes(torch.Size(shape).numel(), self.width),), "scales": (self._count(shape),)}

    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return packed_bytes(torch.Size(shape).numel(), self.width) + _SCALE.itemsize * self._count(shape)

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "by_rows": self.by_rows}

    def of_config(self, config: Mapping[str, Any]) -> Integer:
        return replace(self, by_rows=config.get("by_rows") is True)

    def grouped(self, core: Tensor) -> Tensor:
        """A core as a matrix each of whose rows has a scale."""
        return core.reshape(core.shape[0], core[:1].numel()) if self.by_rows else core.reshape(1, core.numel())

    def _count(self, shape: tuple[int, ...]) -> int:
        return shape[0] if self.by_rows else 1


def kept(scales: Tensor) -> Tensor:
    """Scales as they are kept beside a core."""
    return scales.to(_SCALE).view(torch.int16)


def column(scales: Tensor, like: Tensor) -> Tensor:
    """Kept scales as numbers, in float64, one under the other."""
    return scales.to(like.device).view(_SCALE).double()[:, None]


def nearest(ratios: Tensor, bits: int) -> Tensor:
    """The nearest of the 2^bits levels ..., -1/2, 1/2, 3/2, ...; what is no number (by a scale of zero) becomes 1/2."""
    return _to_levels(torch.nan_to_num(ratios, nan=0.0), bits)


def _to_levels(ratios: Tensor, bits: int) -> Tensor:
    """`nearest` of numbers, which are written over."""
    half = float(1 << bits - 1)
    return ratios.floor_().clamp_(-half, half - 1).add_(0.5)


def nearest_levels(ratios: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """`nearest` for arrays of NumPy, whose calls cost less, and which are written over."""
    half = float(1 << bits - 1)
    np.floor(ratios, out=ratios)
    np.maximum(ratios, -half, out=ratios)
    np.minimum(ratios, half - 1, out=ratios)
    ratios += 0.5
    return ratios


def best_scales(rows: Tensor, bits: int) -> Tensor:
    """For each row the scale of least squared error, of those that reach its largest number or cut some off.

    Errors are compared in float32, relative to the row's largest number.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    size = rows.abs().amax(1, keepdim=True)
    unit = torch.where(size > 0, size, 1.0)
    values = (rows / unit).float()
    # The outermost level stands half a step within the edge of its cell.
    widest = size / ((1 << bits - 1) - 0.5)
    best, lost, levels = widest, torch.full_like(values[:, :1], torch.inf), torch.empty_like(values)
    apart = (1.0 - _LEAST_CLIP) / (_CLIPS - 1)
    coarse = [torch.full_like(widest, 1.0 - apart * k) for k in range(_CLIPS)]
    for finer in (False, True):
        clips = coarse if not finer else [best / widest + apart * k / (_FINER + 1) for k in range(-_FINER, _FINER + 1)]
        for clip in clips:
            scales = (clip.clamp_max(1.0) * widest).to(_SCALE).to(rows.dtype)
            steps = (scales / unit).float()
            torch.div(values, torch.where(steps > 0, steps, 1.0), out=levels)
            _to_levels(levels, bits).mul_(steps).sub_(values)
            error = levels.square_().sum(1, keepdim=True)
            best, lost = torch.where(error < lost, scales, best), torch.minimum(error, lost)
    return best[:, 0]

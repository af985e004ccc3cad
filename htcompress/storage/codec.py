"""What every codec does: numbers into tensors of a file, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Codec(ABC):
    """Stores the numbers of one core.

    A core is stored as one tensor or several, its *parts*; the part "" bears the core's own name, any other stands
    behind it: `U0`, `U0_scales`. Some codecs round to a grid that is fitted to a core; its *scales* are kept beside
    the core for as long as it lives, so that what was decoded is encoded again without loss.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """In files and reports."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """For each number, scales and the like not counted; 0: as wide as the numbers are."""

    def scales(self, core: Tensor) -> Tensor | None:
        """The scales that suit a core, as they are kept; None where the grid is one for all."""
        return None

    @abstractmethod
    def encode(self, core: Tensor, scales: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of a core, with the scales that are kept of it."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The core of these parts, in float32 unless it was stored as it is. Raises `KeyError` where one is missing."""

    @abstractmethod
    def rounded(self, core: Tensor, scales: Tensor | None = None) -> Tensor:
        """A core as it will be decoded, in its own dtype."""

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the parts of a core of some shape."""

    @abstractmethod
    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """What a core of some shape and dtype takes."""

    def holds(self, core: Tensor) -> bool:
        """Whether a core can be stored in it without harm, whatever its numbers."""
        return True

    def to_config(self) -> dict[str, Any]:
        """The codec as JSON values, without scales."""
        return {"name": self.name, "bits": self.bits}

    def of_config(self, config: Mapping[str, Any]) -> Codec:
        """The codec of this name that `to_config` told."""
        return self


class Plain(Codec):
    """Numbers as they are, in the precision of the model."""

    name = "plain"
    bits = 0

    def encode(self, core: Tensor, scales: Tensor | None = None) -> dict[str, Tensor]:
        return {"": core}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return parts[""]

    def rounded(self, core: Tensor, scales: Tensor | None = None) -> Tensor:
        return core

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"": shape}

    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return torch.Size(shape).numel() * dtype.itemsize

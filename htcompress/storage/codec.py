"""What every codec does: numbers into tensors of a file, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class Codec(ABC):
    """Stores the numbers of one core.

    A core is stored as one tensor or several, its *parts*; the part "" bears the core's own name, any other stands
    behind it: `U0`, `U0.scales`. What is decoded can be encoded again without loss.
    """

    name: ClassVar[str]
    """In files and reports."""

    bits: ClassVar[int]
    """For each number, scales and the like not counted; 0: as wide as the numbers are."""

    @abstractmethod
    def encode(self, core: Tensor) -> dict[str, Tensor]:
        """The parts of a core."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The core of these parts, in float32 unless it was stored as it is. Raises `KeyError` where one is missing."""

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the parts of a core of some shape."""

    @abstractmethod
    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """What a core of some shape and dtype takes."""

    def holds(self, core: Tensor) -> bool:
        """Whether a core can be stored in it without harm, whatever its numbers."""
        return True

    def rounded(self, core: Tensor) -> Tensor:
        """A core as it will be decoded, in its own dtype."""
        return self.decode(self.encode(core)).to(core.dtype)

    def to_config(self) -> dict[str, Any]:
        """The codec as JSON values."""
        return {"name": self.name, "bits": self.bits}


class Plain(Codec):
    """Numbers as they are, in the precision of the model."""

    name = "plain"
    bits = 0

    def encode(self, core: Tensor) -> dict[str, Tensor]:
        return {"": core}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts[""]

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"": shape}

    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return torch.Size(shape).numel() * dtype.itemsize

"""What tensor trains, tensor rings and block terms share: cores, their sizes, and what joins them.

All of them fold the matrix into paired modes: mode k has size m_k n_k, a row mode times a column mode.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from htcompress.forms.reduced import Reduced
from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network
from htcompress.vocabulary import Format


@dataclass(frozen=True)
class Structure(ABC):
    """The cores of a format without their numbers.

    Args:
        layout: the folding; its tree plays no part.
        ranks: their meaning is the format's.

    Raises `ShapeError` where the ranks do not fit.
    """

    format: ClassVar[Format]
    orders: ClassVar[Sequence[int]]
    """The numbers of modes that are worth a look."""
    mode_axis: ClassVar[int]
    """Which axis of a core is its mode."""

    layout: Layout
    ranks: tuple[int, ...]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the cores."""

    @property
    @abstractmethod
    def rank_names(self) -> tuple[str, ...]:
        """Of the ranks, for reports."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the cores, in order."""

    @property
    @abstractmethod
    def network(self) -> Network:
        """How the cores hang together."""

    @abstractmethod
    def decompose(self, reduced: Reduced) -> list[Tensor]:
        """The cores for a reduced tensor, its bases multiplied back in, in float64."""

    @abstractmethod
    def contracted(self, modal: Sequence[Tensor], rest: Sequence[Tensor], like: Tensor) -> Tensor:
        """The tensor that cores make whose modes are those of `like`: the cores of the modes, and the others."""

    @classmethod
    @abstractmethod
    def smallest(cls, layout: Layout) -> Self:
        """The structure of fewest numbers in a layout."""

    @classmethod
    @abstractmethod
    def within(cls, layout: Layout, reduced: Reduced, budget: int) -> list[Self]:
        """The structures worth trying that store at most so many numbers."""

    @property
    def parameters(self) -> int:
        """The numbers stored.

        >>> from htcompress.forms import BlockTerm, TensorTrain
        >>> layout = Layout.paired((16, 4, 4, 4), (8, 20, 20, 18))  # the four gates of 256 units, 57,600 inputs
        >>> TensorTrain(layout, (1, 4, 4, 4)).parameters, BlockTerm(layout, (2, 4)).parameters  # as published
        (3360, 3392)
        """
        return sum(prod(shape) for shape in self.shapes)

    def to_config(self) -> dict[str, Any]:
        """The structure as JSON values."""
        return {"form": self.format.value, "layout": self.layout.to_config(), "ranks": list(self.ranks)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `to_config`."""
        return cls(Layout.from_config(config["layout"]), tuple(config["ranks"]))

    def _modes(self, k: int) -> tuple[tuple[str, str], tuple[int, int]]:
        return (f"m{k}", f"n{k}"), (self.layout.row_modes[k], self.layout.col_modes[k])


def padded(core: Tensor, shape: Sequence[int]) -> Tensor:
    """A core with zeros up to the sizes of a structure, where the tensor has not the rank."""
    missing = [
        by for wanted, size in zip(reversed(shape), reversed(core.shape), strict=True) for by in (0, wanted - size)
    ]
    return torch.nn.functional.pad(core, missing)

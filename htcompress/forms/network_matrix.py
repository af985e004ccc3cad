"""A matrix in one of the formats that HT is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.forms.form import MisfitError
from htcompress.forms.structure import Structure
from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network
from htcompress.matrix.stored import Core, Description, Unfactored
from htcompress.side_by_side import cached_property


@dataclass(frozen=True, eq=False)
class NetworkMatrix(Unfactored):
    """A matrix as a network of cores; the counterpart of `HTMatrix`.

    Raises `ShapeError` where the cores do not have the structure's shapes.
    """

    structure: Structure
    cores: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        found = tuple(tuple(core.shape) for core in self.cores)
        if found != self.structure.shapes:
            raise ShapeError(f"Cores of shapes {found} do not fit a structure of {self.structure.shapes}.")

    @classmethod
    def zeros(cls, structure: Structure) -> NetworkMatrix:
        """The zero matrix of a structure."""
        return cls(
            structure, tuple(torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in structure.shapes)
        )

    @classmethod
    def zeros_of(cls, kind: type[Structure], config: dict[str, Any]) -> NetworkMatrix:
        """The zero matrix of a saved structure."""
        return cls.zeros(kind.from_config(config))

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.rows, self.layout.cols

    @property
    def layout(self) -> Layout:
        """How the matrix is folded."""
        return self.structure.layout

    @cached_property
    def network(self) -> Network:
        """How the cores hang together."""
        return self.structure.network

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return self.structure.parameters

    @property
    def core_names(self) -> tuple[str, ...]:
        return self.structure.names

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def folds(self) -> bool:
        return True

    def operands(self) -> tuple[Tensor, ...]:
        """The cores of `network`."""
        return self.cores

    def with_cores(self, cores: Sequence[Core]) -> NetworkMatrix:
        """The same structure with other numbers."""
        return replace(self, cores=tuple(core for core in cores if isinstance(core, Tensor)))

    def map(self, function: Callable[[Tensor], Tensor]) -> NetworkMatrix:
        """The same structure with a function applied to every core."""
        return self.with_cores([function(core) for core in self.cores])

    def reordered(self, rows: Tensor | None, columns: Tensor) -> NetworkMatrix:
        """Raises `ShapeError`: it is folded."""
        raise ShapeError("A matrix that is folded cannot have its rows and columns reordered.")

    def description(self) -> Description:
        structure, layout = self.structure, self.layout
        ranks = dict(zip(structure.rank_names, structure.ranks, strict=True))
        return Description(structure.format.value, layout.row_modes, layout.col_modes, [], ranks)

    def to_config(self) -> dict[str, Any]:
        return self.structure.to_config()

    def dense(self) -> Float[Tensor, "rows cols"]:
        """The matrix itself."""
        return self.network.dense(self.cores)

    def times(self, vectors: Float[Tensor, "cols k"]) -> Float[Tensor, "rows k"]:
        """W X in the vectors' precision."""
        return self.dense().to(vectors.dtype) @ vectors

    def balance(self) -> NetworkMatrix:
        """The same matrix with equal norms in all cores."""
        norms = [float(torch.linalg.vector_norm(core)) for core in self.cores]
        if min(norms) == 0.0:
            return self
        mean = prod(n ** (1 / len(norms)) for n in norms)
        return self.map(lambda core: core * (mean / torch.linalg.vector_norm(core)))


def network_shapes(kind: type[Structure], layout: Layout, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The cores of a structure by name. Raises `MisfitError` where the ranks do not fit it."""
    try:
        structure = kind(layout, tuple(ranks))
    except ShapeError as error:
        raise MisfitError(f"the ranks {str(list(ranks))[:80]} ({error})") from error
    return dict(zip(structure.names, structure.shapes, strict=True))

"""A matrix that is stored as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.matrix.network import Network
from htcompress.matrix.stored import Core, Description, Unfactored


@dataclass(frozen=True, eq=False)
class DenseMatrix(Unfactored):
    """A matrix (rows, cols) as its own core."""

    matrix: Float[Tensor, "rows cols"]

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise ShapeError(f"A dense matrix has two axes; found shape {tuple(self.matrix.shape)}.")

    @classmethod
    def zeros(cls, config: dict[str, Any]) -> DenseMatrix:
        """The zero matrix of a saved structure."""
        return cls(torch.zeros(*config["shape"], dtype=torch.float32, device="cpu"))

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return self.matrix.numel()

    @property
    def cores(self) -> tuple[Core, ...]:
        return (self.matrix,)

    @property
    def core_names(self) -> tuple[str, ...]:
        return ("weight",)

    @property
    def network(self) -> Network | None:
        return None

    @property
    def is_dense(self) -> bool:
        return True

    @property
    def folds(self) -> bool:
        return False

    def operands(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    def with_cores(self, cores: Sequence[Core]) -> DenseMatrix:
        """Another matrix of the same shape."""
        (matrix,) = cores
        if not isinstance(matrix, Tensor):
            raise ShapeError("A dense matrix has numbers for its core, and no identity.")
        return DenseMatrix(matrix)

    def dense(self) -> Float[Tensor, "rows cols"]:
        return self.matrix

    def times(self, vectors: Float[Tensor, "cols k"]) -> Float[Tensor, "rows k"]:
        return self.matrix.to(vectors.dtype) @ vectors

    def balance(self) -> DenseMatrix:
        return self

    def reordered(self, rows: Tensor | None, columns: Tensor) -> DenseMatrix:
        """Its rows and columns taken from elsewhere in it."""
        return DenseMatrix((self.matrix if rows is None else self.matrix[rows])[:, columns])

    def description(self) -> Description:
        return Description("dense", (), (), [], {})

    def to_config(self) -> dict[str, Any]:
        return {"form": "dense", "shape": list(self.shape)}

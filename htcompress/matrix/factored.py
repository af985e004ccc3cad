"""What every matrix that is stored as cores can do, whichever its format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network

Own = TypeVar("Own")


@runtime_checkable
class Factored(Protocol):
    """A matrix (rows, cols) stored as cores; `HTMatrix`, or a format that it is compared with."""

    @property
    def layout(self) -> Layout: ...

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        ...

    @property
    def is_split(self) -> bool:
        """Whether it is a product of a row factor and a column factor."""
        ...

    @property
    def rank(self) -> int: ...

    @property
    def network(self) -> Network:
        """How the cores hang together."""
        ...

    @property
    def cores(self) -> Sequence[Tensor | None]:
        """What is stored; None where it is an identity."""
        ...

    def operands(self) -> Sequence[Tensor]:
        """The cores of `network`, identities written out."""
        ...

    def with_cores(self: Own, cores: Sequence[Tensor | None]) -> Own:
        """The same structure with other numbers."""
        ...

    def dense(self) -> Float[Tensor, "rows cols"]:
        """The matrix itself."""
        ...

    def times(self, vectors: Float[Tensor, "cols k"]) -> Float[Tensor, "rows k"]:
        """W X in the vectors' precision."""
        ...

    def equalise(self: Own) -> Own:
        """The same matrix with equal norms in all cores."""
        ...

    def balance(self: Own) -> Own:
        """The same matrix from well-scaled cores, to train."""
        ...

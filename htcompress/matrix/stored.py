"""What every matrix can do that is stored as cores, whichever its form: the protocol of `htcompress.forms`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from htcompress.matrix.network import Network
from htcompress.tensor import Identity

Core = Tensor | Identity
"""What a form holds at one place: numbers, or an identity that nobody stores."""

Own = TypeVar("Own")


@dataclass(frozen=True)
class Description:
    """What a report says of the form of a matrix.

    Attributes:
        layout: the word for it: `split`, `paired`, `svd`, `tt`, `tr`, `bt`, `dense`.
        row_modes, col_modes: of its tensor; empty where nothing is folded.
        tree: the dimension tree as nested lists; empty where there is none.
        ranks: by the names of edges.
    """

    layout: str
    row_modes: tuple[int, ...]
    col_modes: tuple[int, ...]
    tree: Any
    ranks: dict[str, int]


@dataclass(frozen=True)
class Factor:
    """One of the two factors of a matrix, as a contraction of some of its cores: their indices, and how they meet."""

    network: Network
    cores: tuple[int, ...]


@runtime_checkable
class StoredMatrix(Protocol):
    """A matrix (rows, cols) that is stored as cores.

    Implementations are frozen: what changes numbers or order gives a new matrix.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        ...

    @property
    def cores(self) -> Sequence[Core]: ...

    @property
    def core_names(self) -> Sequence[str]:
        """A name for each core, in the same order."""
        ...

    @property
    def network(self) -> Network | None:
        """How the cores hang together; None of a dense matrix, which has nothing to contract."""
        ...

    @property
    def rank(self) -> int | None:
        """r of the factors R (rows, r) and C (cols, r) with W = R C^T; None where it is no such product."""
        ...

    @property
    def factor_networks(self) -> tuple[Factor, Factor] | None:
        """R and C as contractions of cores; None where it is no such product."""
        ...

    @property
    def is_dense(self) -> bool:
        """Whether its one core is the matrix itself."""
        ...

    @property
    def stores_factors(self) -> bool:
        """Whether its cores are R and C as they stand, and nothing else is stored."""
        ...

    @property
    def folds(self) -> bool:
        """Whether the order of rows or columns matters to how it is stored."""
        ...

    def operands(self) -> Sequence[Tensor]:
        """The cores of `network`, identities written out."""
        ...

    def with_cores(self: Own, cores: Sequence[Core]) -> Own:
        """The same structure with other numbers."""
        ...

    def factors(self) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "cols r"]] | None:
        """R and C with W = R C^T; None where it is no such product."""
        ...

    def dense(self) -> Float[Tensor, "rows cols"]:
        """The matrix itself."""
        ...

    def times(self, vectors: Float[Tensor, "cols k"]) -> Float[Tensor, "rows k"]:
        """W X in the vectors' precision."""
        ...

    def balance(self: Own) -> Own:
        """The same matrix from well-scaled cores, to train."""
        ...

    def reordered(self: Own, rows: Tensor | None, columns: Tensor) -> Own:
        """A matrix whose row k is row `rows[k]` of this one, and columns alike.

        Raises `ShapeError` where it folds: rows cannot be moved without another decomposition.
        """
        ...

    def description(self) -> Description:
        """What a report says of it."""
        ...

    def to_config(self) -> dict[str, Any]:
        """The structure as JSON values; `form` names the form. `htcompress.forms.zeros` is its inverse."""
        ...


class Unfactored:
    """What forms share that are no product of a row factor and a column factor."""

    @property
    def rank(self) -> int | None:
        return None

    @property
    def factor_networks(self) -> tuple[Factor, Factor] | None:
        return None

    @property
    def stores_factors(self) -> bool:
        return False

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None

"""The layout: how a matrix is folded into a tensor, and which tree parts its modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from htcompress.errors import ShapeError
from htcompress.side_by_side import cached_property
from htcompress.tensor import DimensionTree, Nested
from htcompress.tensor.tree import balanced
from htcompress.vocabulary import LayoutKind


@dataclass(frozen=True)
class Layout:
    """A matrix of `rows` x `cols` as a tensor: leaf k has a row mode m_k and a column mode n_k.

    Either mode may be 1. The products of the modes may exceed the sizes; the rest is zero padding, which
    is folded in for the decomposition and never stored or multiplied afterwards.

    >>> layout = Layout.split((4, 64), (30, 40, 3))
    >>> layout.shape, layout.tree.nested, layout.is_split
    ((4, 64, 30, 40, 3), ((0, 1), ((2, 3), 4)), True)

    Raises `ShapeError` where modes and sizes do not fit.
    Source: Oseledets 2010 (matrices as tensors of paired modes); arXiv 2005.04366, section 3.
    """

    rows: int
    cols: int
    row_modes: tuple[int, ...]
    col_modes: tuple[int, ...]
    tree: DimensionTree

    def __post_init__(self) -> None:
        if not len(self.row_modes) == len(self.col_modes) == self.tree.order:
            raise ShapeError(
                f"A layout needs one row mode and one column mode for each of the tree's {self.tree.order} "
                f"leaves; found {self.row_modes} and {self.col_modes}."
            )
        if min(self.row_modes + self.col_modes) < 1:
            raise ShapeError(f"Modes are at least 1; found {self.row_modes} and {self.col_modes}.")
        for what, size, modes in (
            ("rows", self.rows, self.row_modes),
            ("columns", self.cols, self.col_modes),
        ):
            if prod(modes) < size:
                raise ShapeError(f"The modes {modes} hold {prod(modes)} {what}; the matrix has {size}.")

    @classmethod
    def order_two(cls, rows: int, cols: int) -> Layout:
        """Rows against columns, unfolded: the truncated SVD."""
        return cls(rows, cols, (rows, 1), (1, cols), DimensionTree((0, 1)))

    @classmethod
    def split(
        cls,
        row_modes: Sequence[int],
        col_modes: Sequence[int],
        *,
        rows: int | None = None,
        cols: int | None = None,
        row_tree: Nested | None = None,
        col_tree: Nested | None = None,
    ) -> Layout:
        """Leaves of rows only and of columns only; the root parts them. The trees number their own leaves."""
        a, b = len(row_modes), len(col_modes)
        left = balanced(range(a)) if row_tree is None else row_tree
        right = balanced(range(b)) if col_tree is None else col_tree
        return cls(
            rows if rows is not None else prod(row_modes),
            cols if cols is not None else prod(col_modes),
            (*row_modes, *[1] * b),
            (*[1] * a, *col_modes),
            DimensionTree((left, _shift(right, a))),
        )

    @classmethod
    def paired(
        cls,
        row_modes: Sequence[int],
        col_modes: Sequence[int],
        *,
        rows: int | None = None,
        cols: int | None = None,
        tree: Nested | None = None,
    ) -> Layout:
        """Every leaf takes a row mode together with a column mode, as in TT-matrices and the papers."""
        return cls(
            rows if rows is not None else prod(row_modes),
            cols if cols is not None else prod(col_modes),
            tuple(row_modes),
            tuple(col_modes),
            DimensionTree(balanced(range(len(row_modes))) if tree is None else tree),
        )

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The modes m_k * n_k of the folded tensor."""
        return tuple(m * n for m, n in zip(self.row_modes, self.col_modes, strict=True))

    @property
    def kind(self) -> LayoutKind:
        if self.is_split:
            return LayoutKind.SVD if self.tree.order == 2 else LayoutKind.SPLIT
        return LayoutKind.PAIRED

    @cached_property
    def is_split(self) -> bool:
        """Whether the root parts the rows (left) from the columns (right)."""
        children = self.tree.root.children
        if children is None:
            return False
        left, right = (self.tree.nodes[child].leaves for child in children)
        return all(self.col_modes[k] == 1 for k in left) and all(self.row_modes[k] == 1 for k in right)

    def view(self, matrix: Float[Tensor, "rows cols"]) -> tuple[Tensor, list[tuple[int, ...]]]:
        """The matrix with an axis for every row and column mode, padded with zeros, and the axes of each leaf.

        Nothing is copied where nothing is padded.
        """
        if tuple(matrix.shape) != (self.rows, self.cols):
            raise ShapeError(
                f"The layout is for a {self.rows} x {self.cols} matrix; found {' x '.join(map(str, matrix.shape))}."
            )
        below, beside = prod(self.row_modes) - self.rows, prod(self.col_modes) - self.cols
        if below or beside:
            matrix = F.pad(matrix, (0, beside, 0, below))
        d = self.tree.order
        return matrix.reshape(*self.row_modes, *self.col_modes), [(k, d + k) for k in range(d)]

    def fold(self, matrix: Float[Tensor, "rows cols"]) -> Tensor:
        """The tensor of shape `shape` that holds the matrix, padded with zeros."""
        parted, modes = self.view(matrix)
        return parted.permute([axis for mode in modes for axis in mode]).reshape(self.shape)

    def unfold(self, tensor: Tensor) -> Float[Tensor, "rows cols"]:
        """The matrix in a tensor of shape `shape`; the inverse of `fold`."""
        d = self.tree.order
        pairs = [mode for pair in zip(self.row_modes, self.col_modes, strict=True) for mode in pair]
        parted = tensor.reshape(pairs).permute([*range(0, 2 * d, 2), *range(1, 2 * d, 2)])
        full = parted.reshape(prod(self.row_modes), prod(self.col_modes))
        return full[: self.rows, : self.cols]

    def to_config(self) -> dict[str, Any]:
        """The layout as JSON values."""
        return {
            "rows": self.rows,
            "cols": self.cols,
            "row_modes": list(self.row_modes),
            "col_modes": list(self.col_modes),
            "tree": _as_lists(self.tree.nested),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Layout:
        """The inverse of `to_config`."""
        return cls(
            config["rows"],
            config["cols"],
            tuple(config["row_modes"]),
            tuple(config["col_modes"]),
            DimensionTree(_as_pairs(config["tree"])),
        )


def _shift(nested: Nested, by: int) -> Nested:
    if isinstance(nested, int):
        return nested + by
    return _shift(nested[0], by), _shift(nested[1], by)


def _as_lists(nested: Nested) -> Any:
    return nested if isinstance(nested, int) else [_as_lists(part) for part in nested]


def _as_pairs(value: Any) -> Nested:
    return value if isinstance(value, int) else tuple(_as_pairs(part) for part in value)  # type: ignore[return-value]

"""A matrix in Hierarchical Tucker form: a layout and the HT tensor of the folded matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from jaxtyping import Float
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.forms.form import MisfitError
from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network
from htcompress.matrix.stored import Core, Description, Factor
from htcompress.tensor import DimensionTree, HTTensor, ht_svd
from htcompress.vocabulary import Format, LayoutKind


@dataclass(frozen=True, eq=False)
class HTMatrix:
    """A matrix of `layout.rows` x `layout.cols`, stored as an HT tensor.

    >>> import torch
    >>> w = torch.outer(torch.arange(6.0), torch.ones(10))
    >>> h = HTMatrix.from_dense(w, Layout.split((2, 3), (5, 2)), rtol=1e-6)
    >>> h.parameters, torch.allclose(h.dense(), w, atol=1e-5)
    (17, True)
    """

    layout: Layout
    tensor: HTTensor

    def __post_init__(self) -> None:
        if self.tensor.shape != self.layout.shape or self.tensor.tree != self.layout.tree:
            raise ShapeError(f"A tensor of shape {self.tensor.shape} does not fit the layout's {self.layout.shape}.")

    @classmethod
    def from_dense(
        cls,
        matrix: Float[Tensor, "rows cols"],
        layout: Layout,
        *,
        rtol: float | None = None,
        max_parameters: int | None = None,
        max_rank: int | None = None,
    ) -> HTMatrix:
        """Fold and decompose; see `htcompress.tensor.ht_svd` for the goals and the errors raised.

        A large matrix is read in chunks where it lies: folding makes no copy of it.
        """
        view, modes = layout.view(matrix)
        goals = {"rtol": rtol, "max_parameters": max_parameters, "max_rank": max_rank}
        return cls(layout, ht_svd(view, layout.tree, modes=modes, **goals))  # type: ignore[arg-type]

    @classmethod
    def zeros(cls, config: dict[str, Any]) -> HTMatrix:
        """The zero matrix of a saved structure."""
        layout = Layout.from_config(config["layout"])
        return cls(layout, HTTensor.zeros(layout.tree, layout.shape, config["ranks"]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.rows, self.layout.cols

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return self.tensor.parameters

    @property
    def is_split(self) -> bool:
        """Whether it is a product of a row factor and a column factor."""
        return self.layout.is_split

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def stores_factors(self) -> bool:
        """Whether it is a truncated SVD of which both factors, and nothing else, are stored."""
        rows, cols, *root = self.cores if self.layout.kind is LayoutKind.SVD else (None, None)
        return isinstance(rows, Tensor) and isinstance(cols, Tensor) and not isinstance(root[0], Tensor)

    @property
    def folds(self) -> bool:
        """Whether rows or columns are folded; an identity in place of a factor fixes their order, too."""
        plain = self.layout.kind is LayoutKind.SVD and all(isinstance(core, Tensor) for core in self.cores[:2])
        return not plain

    @property
    def network(self) -> Network:
        """How the cores hang together."""
        return _network(self.layout, self.tensor.ranks)

    def operands(self) -> list[Tensor]:
        """The cores of `network`, the identities written out."""
        return [self.tensor.core(node) for node in self.layout.tree.nodes]

    @property
    def cores(self) -> tuple[Core, ...]:
        """The cores by nodes of the tree."""
        return self.tensor.cores

    @property
    def core_names(self) -> tuple[str, ...]:
        """`U<mode>` at leaves, `B<modes>` inside."""
        return core_names(self.layout.tree)

    def with_cores(self, cores: Sequence[Core]) -> HTMatrix:
        """The same structure with other numbers."""
        return replace(self, tensor=replace(self.tensor, cores=tuple(cores)))

    @property
    def rank(self) -> int | None:
        """Of a split layout: the root's rank, which the columns' factor has."""
        children = self.layout.tree.root.children
        return None if children is None or not self.is_split else self.tensor.ranks[children[1]]

    @property
    def factor_networks(self) -> tuple[Factor, Factor] | None:
        return _factor_networks(self.layout, self.tensor.ranks) if self.is_split else None

    def dense(self) -> Float[Tensor, "rows cols"]:
        """The matrix itself."""
        factors = self.factors()
        if factors is not None:
            rows, cols = factors
            return rows @ cols.T
        return self.layout.unfold(self.tensor.dense())

    def times(self, vectors: Float[Tensor, "cols k"]) -> Float[Tensor, "rows k"]:
        """W X in the vectors' precision, through the factors of a split layout."""
        factors = self.factors()
        if factors is None:
            return self.dense().to(vectors.dtype) @ vectors
        rows, cols = (factor.to(vectors.dtype) for factor in factors)
        return rows @ (cols.T @ vectors)

    def balance(self) -> HTMatrix:
        """The same matrix from well-scaled cores; see `HTTensor.balance`."""
        return replace(self, tensor=self.tensor.balance())

    def reordered(self, rows: Tensor | None, columns: Tensor) -> HTMatrix:
        """A truncated SVD with the rows of its factors taken from elsewhere; anything else folds."""
        left, right, *root = self.cores
        if self.folds or not isinstance(left, Tensor) or not isinstance(right, Tensor):
            raise ShapeError("A matrix that is folded cannot have its rows and columns reordered.")
        return self.with_cores([left if rows is None else left[rows], right[columns], *root])

    def description(self) -> Description:
        ranks = dict(zip((node.name for node in self.layout.tree.nodes), self.tensor.ranks, strict=True))
        tree = self.layout.to_config()["tree"]
        return Description(self.layout.kind.value, self.layout.row_modes, self.layout.col_modes, tree, ranks)

    def to_config(self) -> dict[str, Any]:
        return {"form": Format.HT.value, "layout": self.layout.to_config(), "ranks": list(self.tensor.ranks)}

    def factors(self) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "cols r"]] | None:
        """R and C with W = R C^T, padding cut off; None of another than a split layout."""
        if not self.layout.is_split:
            return None
        tree, modes = self.layout.tree, self.layout.shape
        sides = []
        for child, size in zip(tree.root.children or (), (self.layout.rows, self.layout.cols), strict=True):
            node = tree.nodes[child]
            frame = self.tensor.frame(node)
            if list(node.leaves) != sorted(node.leaves):
                parted = frame.reshape(*(modes[k] for k in node.leaves), -1)
                order = sorted(range(len(node.leaves)), key=lambda i: node.leaves[i])
                frame = parted.permute(*order, -1).reshape(-1, frame.shape[1])
            sides.append(frame[:size])
        rows, cols = sides
        root = self.tensor.cores[tree.root.index]
        return (rows @ root[:, :, 0] if isinstance(root, Tensor) else rows), cols


def core_names(tree: DimensionTree) -> tuple[str, ...]:
    """The names of the cores at a tree's nodes: `U<mode>` at leaves, `B<modes>` inside."""
    return tuple(("U" if node.is_leaf else "B") + "_".join(map(str, node.leaves)) for node in tree.nodes)


def stored_shapes(layout: Layout, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The cores of a compact HT tensor that are stored, by name; see `HTTensor.zeros`.

    Raises `MisfitError` where the ranks do not fit the tree.
    """
    tree, shape = layout.tree, layout.shape
    if len(ranks) != len(tree.nodes) or ranks[-1] != 1:
        raise MisfitError(
            f"the ranks {str(list(ranks))[:80]}; expected one for each of its {len(tree.nodes)} nodes, the root's 1,"
        )
    below = [
        (shape[node.leaves[0]],) if node.children is None else tuple(ranks[child] for child in node.children)
        for node in tree.nodes
    ]
    for node, size in zip(tree.nodes, below, strict=True):
        if ranks[node.index] > prod(size):
            raise MisfitError(f"rank {ranks[node.index]} at {node.name}, where at most {prod(size)} fits,")
    stored = [prod(size) != rank for size, rank in zip(below, ranks, strict=True)]
    left, right = tree.root.children or (0, 0)
    free = stored[left] or stored[right] or (ranks[left] == 1 and any(stored[:-1]))
    stored[-1] = not (tree.order > 1 and ranks[left] == ranks[right] and free)
    return {
        name: (*size, ranks[node.index])
        for name, node, size in zip(core_names(tree), tree.nodes, below, strict=True)
        if stored[node.index]
    }


@lru_cache(maxsize=1024)
def _network(layout: Layout, ranks: tuple[int, ...]) -> Network:
    legs, shapes = _axes(layout, ranks)
    return Network(layout, tuple(legs), tuple(shapes))


def _axes(layout: Layout, ranks: tuple[int, ...]) -> tuple[list[tuple[str, ...]], list[tuple[int, ...]]]:
    """The names and sizes of the axes of every core."""
    legs: list[tuple[str, ...]] = []
    shapes: list[tuple[int, ...]] = []
    for node in layout.tree.nodes:
        if node.children is None:
            k = node.leaves[0]
            legs.append((f"m{k}", f"n{k}", f"r{node.index}"))
            shapes.append((layout.row_modes[k], layout.col_modes[k], ranks[node.index]))
        else:
            left, right = node.children
            legs.append((f"r{left}", f"r{right}", f"r{node.index}"))
            shapes.append((ranks[left], ranks[right], ranks[node.index]))
    return legs, shapes


@lru_cache(maxsize=1024)
def _factor_networks(layout: Layout, ranks: tuple[int, ...]) -> tuple[Factor, Factor]:
    """R of the left subtree and the root, C of the right subtree: each a matrix whose one column mode is the rank."""
    tree = layout.tree
    left, right = tree.root.children or (0, 0)
    legs, shapes = _axes(layout, ranks)
    legs[-1], shapes[-1] = legs[-1][:2], shapes[-1][:2]  # the root's own rank is 1
    sides = []
    for top, modes, size, nodes, turned in (
        (left, layout.row_modes, layout.rows, [*range(left + 1), tree.root.index], False),
        (right, layout.col_modes, layout.cols, [*range(left + 1, right + 1)], True),
    ):
        leaves = sorted(tree.nodes[top].leaves)
        last = len(leaves)
        # A factor's rows are its leaves' modes, its one column mode is the rank, at a leaf of its own.
        place = {f"r{right}": f"n{last}"}
        for index, k in enumerate(leaves):
            place |= {f"m{k}": f"{'n' if turned else 'm'}{index}", f"n{k}": f"{'m' if turned else 'n'}{index}"}
        own_legs = [tuple(place.get(leg, leg) for leg in legs[t]) for t in nodes]
        own_shapes = [shapes[t] for t in nodes]
        own_legs[-1], own_shapes[-1] = (*own_legs[-1], f"m{last}"), (*own_shapes[-1], 1)
        row_modes, col_modes = (*(modes[k] for k in leaves), 1), (*[1] * last, ranks[right])
        folded = Layout(size, ranks[right], row_modes, col_modes, DimensionTree.balanced(last + 1))
        sides.append(Factor(Network(folded, tuple(own_legs), tuple(own_shapes)), tuple(nodes)))
    rows, cols = sides
    return rows, cols

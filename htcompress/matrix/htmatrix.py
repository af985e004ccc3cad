"""A matrix in Hierarchical Tucker form: a layout and the HT tensor of the folded matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from jaxtyping import Float
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.matrix.layout import Layout
from htcompress.matrix.network import Network
from htcompress.tensor import HTTensor, ht_svd


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

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return self.tensor.parameters

    @property
    def is_split(self) -> bool:
        """Whether it is a product of a row factor and a column factor."""
        return self.layout.is_split

    @property
    def network(self) -> Network:
        """How the cores hang together."""
        return _network(self.layout, self.tensor.ranks)

    def operands(self) -> list[Tensor]:
        """The cores of `network`, the identities written out."""
        return [self.tensor.core(node) for node in self.layout.tree.nodes]

    @property
    def cores(self) -> tuple[Tensor | None, ...]:
        """What is stored, by nodes of the tree; None where it is an identity."""
        return self.tensor.cores

    def with_cores(self, cores: Sequence[Tensor | None]) -> HTMatrix:
        """The same structure with other numbers."""
        return replace(self, tensor=replace(self.tensor, cores=tuple(cores)))

    @property
    def rank(self) -> int:
        """The rank of the root's edges; for a split layout, the rank of the matrix."""
        children = self.layout.tree.root.children
        return 1 if children is None else self.tensor.ranks[children[0]]

    def dense(self) -> Float[Tensor, "rows cols"]:
        """The matrix itself."""
        if self.layout.is_split:
            rows, cols = self.factors()
            return rows @ cols.T
        return self.layout.unfold(self.tensor.dense())

    def times(self, vectors: Float[Tensor, "cols k"]) -> Float[Tensor, "rows k"]:
        """W X in the vectors' precision, through the factors of a split layout."""
        if not self.layout.is_split:
            return self.dense().to(vectors.dtype) @ vectors
        rows, cols = (factor.to(vectors.dtype) for factor in self.factors())
        return rows @ (cols.T @ vectors)

    def equalise(self) -> HTMatrix:
        """The same matrix with equal norms in all stored cores."""
        return replace(self, tensor=self.tensor.equalise())

    def balance(self) -> HTMatrix:
        """The same matrix from well-scaled cores; see `HTTensor.balance`."""
        return replace(self, tensor=self.tensor.balance())

    def factors(self) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "cols r"]]:
        """R and C with W = R C^T; split layouts only. Padding is cut off."""
        if not self.layout.is_split:
            raise ShapeError("Only a split layout has row and column factors.")
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
        return (rows if root is None else rows @ root[:, :, 0]), cols


@lru_cache(maxsize=1024)
def _network(layout: Layout, ranks: tuple[int, ...]) -> Network:
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
    return Network(layout, tuple(legs), tuple(shapes))

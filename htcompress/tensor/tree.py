"""The dimension tree: which modes of a tensor are separated from which, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from htcompress.errors import ShapeError
from htcompress.side_by_side import cached_property

if TYPE_CHECKING:
    Nested: TypeAlias = "int | tuple[Nested, Nested]"
else:
    Nested = Any  # checks at run time cannot resolve a recursive alias; `DimensionTree` checks by itself


@dataclass(frozen=True)
class Node:
    """One node of a dimension tree: the set of modes below it and its place in the tree."""

    index: int
    leaves: tuple[int, ...]
    children: tuple[int, int] | None
    parent: int | None

    @property
    def is_leaf(self) -> bool:
        return self.children is None

    @property
    def name(self) -> str:
        """The modes below the node, joined by `+`; the key of its rank in reports."""
        return "+".join(map(str, self.leaves))


@dataclass(frozen=True)
class DimensionTree:
    """A binary tree of any shape over the modes 0 .. d-1 of a tensor of order d.

    `nested` is the tree as pairs of pairs; nodes are numbered in post-order, so children come before
    their parents and the root is last.

    >>> tree = DimensionTree(((0, 1), 2))
    >>> tree.order, [node.name for node in tree.nodes]
    (3, ['0', '1', '0+1', '2', '0+1+2'])

    Raises `ShapeError` where the leaves are not 0 .. d-1, each once.
    Source: Grasedyck 2010, definition 3.1.
    """

    nested: Nested

    def __post_init__(self) -> None:
        leaves = sorted(_leaves(self.nested))
        if leaves != list(range(len(leaves))):
            raise ShapeError(f"A dimension tree needs every mode 0 .. d-1 exactly once as a leaf; found {leaves}.")

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes in post-order; the root is the last."""
        found: list[tuple[tuple[int, ...], tuple[int, int] | None]] = []

        def walk(part: Nested) -> int:
            if isinstance(part, int):
                found.append(((part,), None))
            else:
                left, right = walk(part[0]), walk(part[1])
                found.append((found[left][0] + found[right][0], (left, right)))
            return len(found) - 1

        walk(self.nested)
        parents = {child: t for t, (_, children) in enumerate(found) for child in children or ()}
        return tuple(Node(t, leaves, children, parents.get(t)) for t, (leaves, children) in enumerate(found))

    @property
    def order(self) -> int:
        """The number of modes d."""
        return (len(self.nodes) + 1) // 2

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    @cached_property
    def leaf_nodes(self) -> tuple[Node, ...]:
        """The leaves, ordered by the mode they hold."""
        return tuple(sorted((n for n in self.nodes if n.is_leaf), key=lambda n: n.leaves))

    @cached_property
    def inner_nodes(self) -> tuple[Node, ...]:
        """The nodes with children, children before parents."""
        return tuple(n for n in self.nodes if not n.is_leaf)

    def subtree(self, top: Node) -> tuple[Node, ...]:
        """The nodes from `top` downwards in post-order, `top` last."""
        return self.nodes[top.index - 2 * len(top.leaves) + 2 : top.index + 1]

    @classmethod
    def balanced(cls, order: int) -> DimensionTree:
        """The tree that halves the modes at every node.

        >>> DimensionTree.balanced(4).nested
        ((0, 1), (2, 3))
        """
        return cls(balanced(range(order)))

    @classmethod
    def linear(cls, order: int) -> DimensionTree:
        """The tree that parts one mode at a time: the shape of the tensor train.

        >>> DimensionTree.linear(4).nested
        (0, (1, (2, 3)))
        """
        nested: Nested = order - 1
        for leaf in range(order - 2, -1, -1):
            nested = (leaf, nested)
        return cls(nested)


def balanced(leaves: Sequence[int]) -> Nested:
    """The nested pairs of a balanced tree over `leaves`, in their order."""
    if not leaves:
        raise ShapeError("A dimension tree needs at least one mode.")
    if len(leaves) == 1:
        return leaves[0]
    half = (len(leaves) + 1) // 2
    return balanced(leaves[:half]), balanced(leaves[half:])


def _leaves(nested: Nested) -> tuple[int, ...]:
    if isinstance(nested, int):
        return (nested,)
    if not (isinstance(nested, tuple) and len(nested) == 2):
        raise ShapeError(f"A dimension tree is made of pairs and mode numbers; found {nested!r}.")
    return _leaves(nested[0]) + _leaves(nested[1])

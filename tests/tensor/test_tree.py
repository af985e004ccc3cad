"""The dimension tree numbers, names and cuts its nodes as its nested pairs say."""

from __future__ import annotations

from math import ceil, log2

import pytest
from hypothesis import given
from oracles import NON_CONTIGUOUS, examples, nested_trees

from htcompress.errors import ShapeError
from htcompress.tensor import DimensionTree, Nested


def post_order(nested: Nested) -> list[tuple[int, ...]]:
    """The modes below every part of a nested tree, children first."""
    if isinstance(nested, int):
        return [(nested,)]
    left, right = (post_order(part) for part in nested)
    return [*left, *right, left[-1] + right[-1]]


def depth(nested: Nested) -> int:
    return 0 if isinstance(nested, int) else 1 + max(map(depth, nested))


@examples(60)
@given(nested_trees(most=8))
def test_nodes_are_the_parts_in_post_order(nested: Nested) -> None:
    tree, parts = DimensionTree(nested), post_order(nested)
    assert [node.leaves for node in tree.nodes] == parts
    assert [node.index for node in tree.nodes] == list(range(len(parts)))
    assert [node.name for node in tree.nodes] == ["+".join(map(str, part)) for part in parts]
    assert tree.order == len(parts[-1])
    assert tree.root is tree.nodes[-1]
    assert tree.root.parent is None
    for node in tree.nodes:
        assert node.is_leaf == (len(node.leaves) == 1)
        if node.children is not None:
            left, right = (tree.nodes[child] for child in node.children)
            assert left.parent == right.parent == node.index
            assert left.leaves + right.leaves == node.leaves
    assert [leaf.leaves for leaf in tree.leaf_nodes] == [(k,) for k in range(tree.order)]
    assert list(tree.inner_nodes) == [node for node in tree.nodes if node.children is not None]


@examples(60)
@given(nested_trees(most=8))
def test_a_subtree_is_what_hangs_below(nested: Nested) -> None:
    tree = DimensionTree(nested)
    for top in tree.nodes:
        below = [node for node in tree.nodes if set(node.leaves) <= set(top.leaves)]
        assert list(tree.subtree(top)) == below
        assert below[-1] is top


@pytest.mark.parametrize("order", range(1, 12))
def test_balanced_is_as_flat_as_can_be_and_linear_as_deep(order: int) -> None:
    flat, deep = DimensionTree.balanced(order), DimensionTree.linear(order)
    assert flat.root.leaves == deep.root.leaves == tuple(range(order))
    assert depth(flat.nested) == ceil(log2(order))
    assert depth(deep.nested) == order - 1


def test_known_trees() -> None:
    assert DimensionTree.balanced(5).nested == (((0, 1), 2), (3, 4))
    assert DimensionTree.linear(3).nested == (0, (1, 2))
    tree = DimensionTree(NON_CONTIGUOUS)
    assert [node.name for node in tree.nodes] == ["2", "0", "2+0", "1", "3", "1+3", "2+0+1+3"]
    assert tree == DimensionTree(((2, 0), (1, 3)))
    assert tree != DimensionTree(((0, 2), (1, 3)))
    assert hash(tree) == hash(DimensionTree(((2, 0), (1, 3))))


@pytest.mark.parametrize(
    "nested", [1, -1, (0, 0), (1, 2), (0, 2), ((0, 1), (1, 2)), (0, (1, -1)), (), (0,), (0, 1, 2), "0"]
)
def test_a_tree_needs_every_mode_once(nested: Nested) -> None:
    with pytest.raises(ShapeError):
        DimensionTree(nested)


def test_no_modes_make_no_tree() -> None:
    with pytest.raises(ShapeError):
        DimensionTree.balanced(0)
    with pytest.raises(ShapeError):
        DimensionTree.linear(0)

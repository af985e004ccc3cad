"""What the tests compare with: plain sums and float64 SVDs, written without the library's algebra."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from htcompress.tensor import DimensionTree, HTTensor, Nested

NON_CONTIGUOUS = ((2, 0), (1, 3))
"""A tree whose nodes hold modes that do not follow one another."""


# ---- trees and tensors ----------------------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn, least: int = 1, most: int = 5) -> DimensionTree:
    """Any binary tree over any order of the modes."""

    def split(modes: Sequence[int]) -> Nested:
        if len(modes) == 1:
            return modes[0]
        cut = draw(st.integers(1, len(modes) - 1))
        return split(modes[:cut]), split(modes[cut:])

    order = draw(st.integers(least, most))
    return DimensionTree(split(draw(st.permutations(range(order)))))


@st.composite
def ht_tensors(draw: st.DrawFn, least: int = 1, most: int = 5, size: int = 4, rank: int = 3) -> HTTensor:
    """Random cores on a random tree, ranks anything from 1 (also more than the sizes allow)."""
    tree = draw(trees(least, most))
    shape = draw(st.tuples(*[st.integers(1, size)] * tree.order))
    ranks = draw(st.tuples(*[st.integers(1, rank)] * len(tree.nodes)))
    return random_ht(tree, shape, ranks, seed=draw(st.integers(0, 2**16)))


def random_ht(tree: DimensionTree, shape: Sequence[int], ranks: Sequence[int], *, seed: int = 0) -> HTTensor:
    """Normal cores in float64; the root's rank is taken as 1."""
    generator = torch.Generator().manual_seed(seed)
    ranks = [*ranks[:-1], 1]
    cores = [
        torch.randn(*core_shape(tree, shape, ranks, t), generator=generator, dtype=torch.float64)
        for t in range(len(tree.nodes))
    ]
    return HTTensor.from_cores(tree, cores)


def core_shape(tree: DimensionTree, shape: Sequence[int], ranks: Sequence[int], t: int) -> tuple[int, ...]:
    node = tree.nodes[t]
    below = [shape[node.leaves[0]]] if node.children is None else [ranks[child] for child in node.children]
    return (*below, ranks[t])


def dense_of(ht: HTTensor) -> Tensor:
    """The tensor as one sum over all cores; a core that is not stored is the identity."""
    operands: list[object] = []
    d = ht.tree.order
    for node, stored in zip(ht.tree.nodes, ht.cores, strict=True):
        shape = core_shape(ht.tree, ht.shape, ht.ranks, node.index)
        core = np.eye(max(shape)).reshape(shape) if stored is None else stored.detach().double().numpy()
        below = [node.leaves[0]] if node.children is None else [d + child for child in node.children]
        operands += [core, [*below, d + node.index]]
    dense = np.einsum(*operands, [*range(d), d + ht.tree.root.index], optimize="greedy")
    return torch.from_numpy(np.ascontiguousarray(dense[..., 0]))


def unfolding(x: Tensor, modes: Sequence[int]) -> Tensor:
    """The matrix whose rows are `modes` and whose columns are the others."""
    rest = [k for k in range(x.ndim) if k not in modes]
    return x.permute(*modes, *rest).reshape(prod(x.shape[k] for k in modes), -1)


def spectra_of(x: Tensor, tree: DimensionTree) -> list[Tensor]:
    """The singular values of the unfolding at every node but the root, in float64."""
    return [torch.linalg.svdvals(unfolding(x.double(), node.leaves)) for node in tree.nodes[:-1]]


def squared_tail(spectra: Sequence[Tensor], tree: DimensionTree, ranks: Sequence[int]) -> float:
    """The bound on the squared error of a truncation: what is cut at every edge, the root's two counted once."""
    right = tree.nodes[-1].children[1]
    return sum(
        float(values[rank:].square().sum())
        for t, (values, rank) in enumerate(zip(spectra, ranks, strict=False))
        if t != right
    )


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, or ||a|| where b is zero."""
    scale = float(torch.linalg.vector_norm(b.double()))
    return float(torch.linalg.vector_norm(a.double() - b.double())) / (scale or 1.0)


# ---- matrices -------------------------------------------------------------------------------------------


def square_root(moment: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def svd_error(matrix: Tensor, rank: int) -> float:
    """The squared error of the best approximation of this rank."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())


def shrunk_moment(inputs: Tensor) -> Tensor:
    """Oracle approximating shrinkage of the second moment of the rows (Chen et al. 2010, equation 23)."""
    n, p = inputs.shape
    moment = inputs.double().T @ inputs.double() / n
    trace, square = float(moment.trace()), float(moment.square().sum())
    amount = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    amount = min(1.0, amount)
    return (1 - amount) * moment + amount * trace / p * torch.eye(p, dtype=torch.float64)

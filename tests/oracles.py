"""What the tests compare with: plain sums and float64 SVDs, written without the library's algebra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import torch
from crossing import examples as scaled
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from htcompress.matrix import Metric
from htcompress.matrix.inputs import Inputs
from htcompress.tensor import DimensionTree, HTTensor, Nested

NON_CONTIGUOUS = ((2, 0), (1, 3))
"""A tree whose nodes hold modes that do not follow one another."""


def examples(count: int) -> settings:
    """So many examples, the same in every run."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(derandomize=True, max_examples=scaled(count), deadline=None, phases=phases)


# ---- trees and tensors ----------------------------------------------------------------------------------


# Strategies draw plain numbers: objects of the library are built, and checked, in the tests.


@st.composite
def nested_trees(draw: st.DrawFn, least: int = 1, most: int = 5) -> Nested:
    """Any binary tree over any order of the modes."""

    def split(modes: Sequence[int]) -> Nested:
        if len(modes) == 1:
            return modes[0]
        cut = draw(st.integers(1, len(modes) - 1))
        return split(modes[:cut]), split(modes[cut:])

    order = draw(st.integers(least, most))
    return split(draw(st.permutations(range(order))))


@dataclass(frozen=True)
class Drawn:
    """A drawn tree with sizes and ranks, and a seed for the numbers."""

    nested: Nested
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    seed: int

    @property
    def tree(self) -> DimensionTree:
        return DimensionTree(self.nested)

    def ht(self, *, seed: int = 0) -> HTTensor:
        """Normal cores of these ranks; another tensor for another seed."""
        return random_ht(self.tree, self.shape, self.ranks, seed=self.seed + seed)

    def dense(self) -> Tensor:
        """Normal numbers of this shape."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(*self.shape, generator=generator, dtype=torch.float64)


@st.composite
def drawn(draw: st.DrawFn, least: int = 1, most: int = 5, size: int = 4, rank: int = 3) -> Drawn:
    """A random tree with sizes and ranks from 1, ranks also higher than the sizes allow."""
    nested = draw(nested_trees(least, most))
    order = _order(nested)
    shape = draw(st.tuples(*[st.integers(1, size)] * order))
    ranks = draw(st.tuples(*[st.integers(1, rank)] * (2 * order - 2)))
    return Drawn(nested, shape, (*ranks, 1), draw(st.integers(0, 2**16)))


def _order(nested: Nested) -> int:
    return 1 if isinstance(nested, int) else _order(nested[0]) + _order(nested[1])


def random_ht(tree: DimensionTree, shape: Sequence[int], ranks: Sequence[int], *, seed: int = 0) -> HTTensor:
    """Normal cores in float64."""
    generator = torch.Generator().manual_seed(seed)
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
        core = np.eye(max(shape)).reshape(shape) if not isinstance(stored, Tensor) else stored.detach().double().numpy()
        below = [node.leaves[0]] if node.children is None else [d + child for child in node.children]
        operands += [core, [*below, d + node.index]]
    dense = np.einsum(*operands, [*range(d), d + ht.tree.root.index], optimize="greedy")
    return torch.from_numpy(np.ascontiguousarray(dense[..., 0]))


def attainable_ranks(tree: DimensionTree, shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every choice of ranks that some tensor of this shape has: no rank above the product of the other two
    at a node, nor above the size of either side, and one rank at the root's two edges."""
    sizes = [prod(shape[k] for k in node.leaves) for node in tree.nodes]
    ranges = [range(1, min(size, sizes[-1] // size) + 1) for size in sizes]
    for ranks in product(*ranges):
        triples = [(*(ranks[c] for c in node.children), ranks[node.index]) for node in tree.inner_nodes]
        if all(max(triple) ** 2 <= prod(triple) for triple in triples):
            yield ranks


def unfolding(x: Tensor, modes: Sequence[int]) -> Tensor:
    """The matrix whose rows are `modes` and whose columns are the others."""
    rest = [k for k in range(x.ndim) if k not in modes]
    return x.permute(*modes, *rest).reshape(prod(x.shape[k] for k in modes), -1)


def spectra_of(x: Tensor, tree: DimensionTree) -> list[Tensor]:
    """The singular values of the unfolding at every node but the root, in float64."""
    return [torch.linalg.svdvals(unfolding(x.double(), node.leaves)) for node in tree.nodes[:-1]]


def squared_tail(spectra: Sequence[Tensor], tree: DimensionTree, ranks: Sequence[int]) -> float:
    """The bound on the squared error of a truncation: what is cut at every edge, the root's two counted once."""
    left, right = tree.root.children
    ranks = [*ranks]
    ranks[left] = min(ranks[left], ranks[right])
    return sum(
        float(values[rank:].square().sum())
        for t, (values, rank) in enumerate(zip(spectra, ranks, strict=False))
        if t != right
    )


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, or ||a|| where b is zero."""
    a, b = a.detach().double(), b.detach().double()
    return float(torch.linalg.vector_norm(a - b)) / (float(torch.linalg.vector_norm(b)) or 1.0)


# ---- matrices -------------------------------------------------------------------------------------------


def square_root(moment: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def svd_error(matrix: Tensor, rank: int) -> float:
    """The squared error of the best approximation of this rank."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())


def seen(x: Tensor) -> Inputs:
    """Inputs of a matrix that remember what they were made from."""
    inputs = Inputs.of(x)
    inputs.given = x
    return inputs


def observed(rows: int, cols: int, *, samples: int = 60, seed: int = 0) -> Metric:
    """A metric from made-up data: correlated inputs and gradients, large in some directions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, size: int) -> Tensor:
        mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.diag(torch.linspace(0.3, 2, size))
        return torch.randn(count, size, generator=generator) @ mixing

    deltas = draw(2 * rows + 20, rows)
    return Metric(rows, cols, gradients=deltas.T @ deltas / len(deltas), inputs=seen(draw(samples, cols)))


def roots_of(metric: Metric) -> tuple[Tensor, Tensor]:
    """G^(1/2) and A^(1/2), written out; G with a millionth of its mean to be invertible, A with its shrinkage."""
    g = torch.eye(metric.rows, dtype=torch.float64)
    if metric.gradients is not None:
        given = metric.gradients.double()
        given = torch.diag(given) if given.ndim == 1 else given
        g = given + 1e-6 * given.trace() / metric.rows * g
    a = torch.eye(metric.cols, dtype=torch.float64)
    if metric.inputs is not None:
        keep, ridge = metric.shrinkage
        x = metric.inputs.given.double()
        a = keep * x.T @ x + ridge * a
    return square_root(g), square_root(a)


def weighted_error(metric: Metric, difference: Tensor) -> float:
    """|| G^(1/2) D A^(1/2) ||_F^2, by its definition."""
    g, a = roots_of(metric)
    return float((g @ difference.double() @ a).square().sum())

"""HT-SVD: from a dense tensor to its Hierarchical Tucker form, through Gram matrices.

Leaves to root, projecting at once after each node so that the tensor shrinks. Singular bases are
eigenvectors of Gram matrices, accumulated in float64 where the tolerance needs it: float32 Grams fail
below a relative tolerance of about 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, prod, sqrt

import torch
from torch import Tensor

from htcompress.errors import RequestError, ShapeError
from htcompress.tensor.ht import HTTensor
from htcompress.tensor.ranks import RankModel, parameter_count, ranks_for_budget, ranks_for_error
from htcompress.tensor.tree import DimensionTree, Node

_SMALL = 1 << 22  # numbers up to which float64 costs nothing worth saving
_GRAM_LIMIT = 3000  # the largest Gram matrix that is formed where a few directions are wanted
_CHUNK = 1 << 22  # numbers per Gram chunk
OVERSAMPLE = 16


@dataclass(frozen=True)
class Decomposition:
    """A tensor in canonical HT form with its singular values; the start of every choice of ranks.

    `discarded` is the squared norm of what is already gone: what the cap on the ranks cut off, or,
    where the tensor is one half of a matrix, what the split between the halves lost.
    """

    tensor: HTTensor
    spectra: tuple[Tensor, ...]
    norm: float
    discarded: float

    @property
    def model(self) -> RankModel:
        return RankModel(self.tensor.tree, self.tensor.shape, self.spectra)

    def truncate(self, ranks: Sequence[int]) -> HTTensor:
        """The tensor of these ranks, compact."""
        return self.tensor.sliced(ranks).compact()


def ht_svd(
    x: Tensor,
    tree: DimensionTree,
    *,
    ranks: Sequence[int] | None = None,
    rtol: float | None = None,
    max_parameters: int | None = None,
    max_rank: int | None = None,
) -> HTTensor:
    """Decompose a dense tensor; the ranks are given, or follow from an error or a number of parameters.

    >>> import torch
    >>> x = torch.einsum("i,j,k->ijk", torch.arange(1.0, 5), torch.ones(5), torch.ones(6))
    >>> h = ht_svd(x, DimensionTree.balanced(3), rtol=1e-6)
    >>> h.ranks, h.parameters, h.relative_error(x) < 1e-6
    ((1, 1, 1, 1, 1), 15, True)

    Args:
        x: a tensor of order d, floating point, on any device; half precision is computed in float32.
        tree: a dimension tree over its d modes.
        ranks: one for each of `tree.nodes`; larger than possible is cut to what is possible.
        rtol: the relative Frobenius error that is not exceeded.
        max_parameters: the stored numbers that are not exceeded (identities are not stored).
        max_rank: a cap on every rank, in addition.

    Returns:
        the compact HT tensor, with the dtype of `x` (float32 for half precision).

    Raises:
        ShapeError: the tree does not fit the tensor.
        RequestError: more than one goal, a negative error, or fewer parameters than rank one needs.

    Source: Grasedyck 2010; sequential projection as in Vannieuwenhoven et al. 2012.
    """
    if sum(goal is not None for goal in (ranks, rtol, max_parameters)) > 1:
        raise RequestError("Give one of ranks, rtol and max_parameters, not several.")
    if rtol is not None and not rtol >= 0:
        raise RequestError(f"A relative error is a number >= 0; found {rtol}.")
    found = decompose(x, tree, rtol=rtol, max_parameters=max_parameters, max_rank=max_rank, ranks=ranks)
    shape = found.tensor.shape
    if ranks is not None:
        chosen = tuple(ranks)
    elif max_parameters is not None:
        budgeted = ranks_for_budget(tree, shape, found.spectra, max_parameters)
        if budgeted is None:
            least = found.model.parameters(found.model.smallest())
            raise RequestError(
                f"{max_parameters} parameters are fewer than the {least} that rank one of shape {shape} needs."
            )
        chosen = budgeted
    else:
        left_over = max(0.0, ((rtol or 0.0) * found.norm) ** 2 - found.discarded)
        chosen = ranks_for_error(tree, shape, found.spectra, left_over)
        if max_rank is None and found.model.parameters(chosen) > parameter_count(tree, shape, _full_ranks(tree, shape)):
            # High ranks can cost more than full ones, whose identities are free.
            found = decompose(x, tree)
            chosen = found.tensor.ranks
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    return found.truncate(chosen).map(lambda core: core.to(dtype))


def _full_ranks(tree: DimensionTree, shape: Sequence[int]) -> list[int]:
    sizes = [prod(shape[k] for k in node.leaves) for node in tree.nodes]
    return [min(size, sizes[-1] // size) for size in sizes]


def decompose(
    x: Tensor,
    tree: DimensionTree,
    *,
    rtol: float | None = None,
    max_parameters: int | None = None,
    max_rank: int | None = None,
    ranks: Sequence[int] | None = None,
) -> Decomposition:
    """The canonical form of a dense tensor, as exact as the goal needs.

    No rank above sqrt(max_parameters) + 1 can be part of a tensor that stores so few numbers (some core
    holds at least r^2), which caps the work; without a goal the form is exact.
    """
    if x.ndim != tree.order:
        raise ShapeError(f"A tensor of order {x.ndim} does not fit a tree over {tree.order} modes.")
    if not x.is_floating_point():
        raise ShapeError(f"HT-SVD needs floating-point numbers; found {x.dtype}.")
    fine = x.numel() <= _SMALL or (rtol is not None and rtol < 1e-3)
    work = x.to(torch.float64 if fine or x.dtype == torch.float64 else torch.float32)
    squared = float(sum(chunk.double().square().sum() for chunk in work.reshape(-1).split(_CHUNK)))
    cap = None
    if max_parameters is not None:
        cap = isqrt(max(0, max_parameters)) + 1
    if ranks is not None:
        cap = max(ranks)
    if max_rank is not None:
        cap = max_rank if cap is None else min(cap, max_rank)
    edges = max(1, 2 * tree.order - 3)
    edge_tail = ((rtol or 0.0) ** 2) * squared / edges
    cores, discarded = project(work.unsqueeze(-1), tree.nodes, cap=cap, edge_tail=edge_tail)
    tensor, spectra = HTTensor.from_cores(tree, [core.double() for core in cores]).canonical()
    return Decomposition(tensor, spectra, sqrt(squared), discarded)


def project(x: Tensor, nodes: Sequence[Node], *, cap: int | None, edge_tail: float) -> tuple[list[Tensor], float]:
    """The cores below and at the top of `nodes` for a tensor (modes in increasing order, open rank).

    Every edge below the top is cut to `cap` ranks and to a squared tail of at most `edge_tail`, one
    after the other, the tensor projected each time. Returns the cores in the order of `nodes` (the
    top's core carries the open rank last) and the squared norm that was cut off.
    """
    top = nodes[-1]
    if top.is_leaf:
        return [x.clone()], 0.0
    axes = [node for node in sorted(nodes, key=lambda n: n.leaves) if node.is_leaf]
    siblings = {a: b for left, right in [top.children or (0, 0)] for a, b in ((left, right), (right, left))}
    cores: dict[int, Tensor] = {}
    discarded = 0.0

    def shrink(node: Node) -> None:
        nonlocal x, discarded
        axis = axes.index(node)
        # The two edges below a root are one: what the first has cut is not cut again at the second.
        again = x.shape[-1] == 1 and node.parent == top.index and siblings[node.index] in cores
        basis, lost = _leading_basis(x, axis, cap, 0.0 if again else edge_tail)
        x = _apply(x, axis, basis)
        cores[node.index] = basis
        discarded += lost

    def urgency(leaf: Node) -> tuple[bool, float]:
        size = x.shape[axes.index(leaf)]
        return size > x.numel() // max(1, size), -size / min(size, cap or size)

    for leaf in sorted(axes, key=urgency):
        shrink(leaf)
    by_index = {node.index: node for node in nodes}
    for node in nodes:
        if node.children is None:
            continue
        pair = [axes.index(by_index[child]) for child in node.children]
        rest = [a for a in range(len(axes)) if a not in pair]
        sizes = [x.shape[a] for a in pair]
        x = x.permute(*pair, *rest, x.ndim - 1)
        axes = [node, *(axes[a] for a in rest)]
        x = x.reshape(prod(sizes), *x.shape[2:])
        if node is top:
            cores[node.index] = x.reshape(*sizes, x.shape[-1])
        else:
            shrink(node)
            cores[node.index] = cores[node.index].reshape(*sizes, -1)
    return [cores[node.index] for node in nodes], discarded


def _leading_basis(x: Tensor, axis: int, cap: int | None, edge_tail: float) -> tuple[Tensor, float]:
    """Orthonormal (n, r): the leading singular vectors of the unfolding along `axis`, and what they miss."""
    n = x.shape[axis]
    rest = x.numel() // max(1, n)
    limit = min(n, rest, cap or n)
    if limit == n and edge_tail == 0.0:
        return torch.eye(n, dtype=x.dtype, device=x.device), 0.0
    if min(n, rest) > _GRAM_LIMIT and limit + OVERSAMPLE < min(n, rest) // 4:
        unfolding = x.movedim(axis, 0).reshape(n, rest)
        basis, squares = leading_left(unfolding, limit + OVERSAMPLE)
        total = float(sum(chunk.double().square().sum() for chunk in unfolding.split(64)))
    elif n <= rest:
        squares, vectors = _eigh(_gram(x, axis))
        basis, total = vectors, float(squares.sum())
    else:
        unfolding = x.movedim(axis, 0).reshape(n, rest)
        squares, vectors = _eigh(_gram(unfolding, 1))
        basis, total = torch.linalg.qr(unfolding.double() @ vectors)[0], float(squares.sum())
    rank = min(limit, len(squares))
    kept = torch.cumsum(squares, 0)
    enough = int((total - kept > edge_tail).sum()) + 1
    rank = max(1, min(rank, enough))
    return basis[:, :rank].to(x.dtype), max(0.0, total - float(kept[rank - 1]))


def leading_left(matrix: Tensor, size: int, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors (n, size) and squared singular values, by randomised subspace iteration.

    Seeded by itself, so that a decomposition is repeatable and no global state is touched.
    Source: Halko, Martinsson, Tropp 2011, algorithm 4.4.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], size, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    small = (basis.T @ matrix).double()
    squares, rotation = _eigh(small @ small.T)
    return basis.double() @ rotation, squares


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _gram(x: Tensor, axis: int) -> Tensor:
    """The Gram matrix of the unfolding along `axis`, in float64, in chunks, without a permuted copy."""
    n = x.shape[axis]
    view = x.contiguous().reshape(prod(x.shape[:axis]), n, -1)
    total = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    if view.shape[2] == 1:
        for part in view[:, :, 0].split(max(1, _CHUNK // n)):
            total += part.T @ part
        return total
    if view.shape[0] == 1:
        for part in view[0].split(max(1, _CHUNK // n), dim=1):
            total += part @ part.T
        return total
    for part in view.split(max(1, _CHUNK // (n * view.shape[2]))):
        total += (part @ part.mT).double().sum(0)
    return total


def _apply(x: Tensor, axis: int, basis: Tensor) -> Tensor:
    """Multiply the transposed basis (n, r) into one axis."""
    if basis.shape[0] == basis.shape[1] and torch.equal(basis, torch.eye(len(basis), dtype=x.dtype, device=x.device)):
        return x
    shape = list(x.shape)
    shape[axis] = basis.shape[1]
    view = x.reshape(prod(shape[:axis]), basis.shape[0], -1)
    return (basis.T @ view).reshape(shape)

"""From a matrix, a layout and a metric to the HT form that loses least in that metric.

A split layout is exact at its root: the best subspace of outputs in the metric is found whatever the
columns' second moment, without ever forming it (cols x cols). Each half is then folded and decomposed in its
own metric, taken by modes. Other layouts are whitened by modes as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from htcompress.forms.ht import HTMatrix
from htcompress.matrix.blocks import LARGE, chunked_gram, thin_product, working
from htcompress.matrix.layout import Layout
from htcompress.matrix.metric import Metric
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.matrix.whitening import Whitening, multiply
from htcompress.side_by_side import cached_property
from htcompress.tensor import Decomposition, DimensionTree, HTTensor, Nested, RankModel, decompose
from htcompress.tensor.pieces import Transposed
from htcompress.tensor.projection import OVERSAMPLE, edge_spectra, eigh, leading_left
from htcompress.tensor.tree import balanced


@dataclass(frozen=True, eq=False)
class RootSplit:
    """The best low-rank form W = R C^T in the metric, up to a cap on the rank.

    Attributes:
        left: (rows, cap) R.
        right: (cols, cap) C.
        values: (cap,) the singular values of G^(1/2) W A^(1/2), descending.
        lost: the squared weight beyond the cap.
        total: the squared weight of everything.
    """

    metric: Metric
    left: Float[Tensor, "rows r"]
    right: Float[Tensor, "cols r"]
    values: Float[Tensor, " r"]
    lost: float
    total: float
    _outlines: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, target: WeightedMatrix, *, cap: int | None = None) -> RootSplit:
        """Split a matrix; `cap` bounds the rank (all of it if None)."""
        matrix, metric = target.matrix, target.metric
        cap = min(*matrix.shape, cap or min(matrix.shape))
        dtype = target.dtype
        if metric.is_plain and matrix.shape[1] < matrix.shape[0]:
            squares, vectors = eigh(chunked_gram(working(matrix.dense()).T))
            values = squares[:cap].sqrt()
            # The singular values go with the columns, as they do below.
            scale = values.clamp_min(1e-8 * float(values[0]) or 1.0)
            left, right = matrix.times(vectors[:, :cap]) / scale, vectors[:, :cap] * scale
            total = float(squares.sum())
            return cls(metric, left, right.to(dtype), values, max(0.0, total - float(squares[:cap].sum())), total)
        if target.gram is not None and target.inputs_root is not None:
            squares, vectors = (found[..., :cap] for found in eigh(target.gram))
            values, factor = squares.sqrt(), target.inputs_root
            scale = values.clamp_min(1e-8 * float(values[0]) or 1.0)
            left = matrix.times(factor @ (vectors / scale))
            right = torch.linalg.solve_triangular(factor.T, vectors * scale, upper=True)
            return cls(
                metric, left, right.to(dtype), values, max(0.0, target.total - float(squares.sum())), target.total
            )
        if target.gram is not None:
            squares, vectors = eigh(target.gram)
        else:
            # A few directions more than wanted: the last of those that are iterated are the least exact.
            vectors, squares = leading_left(_Weighted(target, dtype), min(cap + OVERSAMPLE, matrix.shape[0]))
        squares, basis = squares[:cap], vectors[:, :cap]
        right = matrix.transposed(metric.row_root.apply(basis).to(dtype))
        left = metric.row_root.remove(basis)
        lost = max(0.0, target.total - float(squares.sum()))
        return cls(metric, left, right, squares.sqrt(), lost, target.total)

    def leading(self, rank: int) -> RootSplit:
        """The same split cut off at a smaller cap."""
        if rank >= len(self.values):
            return self
        left, right, values = self.left[:, :rank], self.right[:, :rank], self.values[:rank]
        return replace(self, left=left, right=right, values=values, lost=self.beyond(rank))

    def beyond(self, rank: int) -> float:
        """The squared error of the truncated SVD of a rank."""
        return self.lost + float(self.values[rank:].square().sum())

    def error_of(self, rows: Float[Tensor, "rows r"], cols: Float[Tensor, "cols r"]) -> Float[Tensor, ""]:
        """The squared error of R C^T, without W: exact up to what W has in common with R C^T beyond the cap.

        With G^(1/2) W A^(1/2) = B S V^T, L = G^(1/2) B and D = A W^T L it is <G W A, R C^T> = <L^T R, D^T C>:
        two thin products, and the Gram matrices of R and C.
        """
        left, right = self._outline(rows.dtype)
        along = ((left.T @ rows) * thin_product(right.T, cols)).sum()
        return self.total - 2 * along + (self.metric.row_gram(rows) * self.metric.col_gram(cols)).sum()

    def _outline(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """L and D; W^T L is the right factor."""
        if dtype not in self._outlines:
            left = self.metric.row_root.weigh(self.left).to(dtype)
            self._outlines[dtype] = left, self.metric.through(self.right.to(dtype))
        return self._outlines[dtype]


class _Weighted:
    """G^(1/2) W A^(1/2) by its products, for matrices of too many rows for a Gram matrix.

    The columns are those of W, for the ridge, and the samples.
    """

    def __init__(self, target: WeightedMatrix, dtype: torch.dtype) -> None:
        self.matrix, self.root, self.dtype = target.matrix, target.metric.row_root.to(dtype), dtype
        keep, ridge = target.metric.shrinkage
        self.ridge = ridge**0.5
        self.seen = self.matrix.parts[0].lying.new_zeros(self.matrix.shape[0], 0, dtype=dtype)
        if target.metric.inputs is not None and keep > 0:
            self.seen = keep**0.5 * target.metric.inputs.outputs(self.matrix).to(dtype)
        self.shape = self.matrix.shape[0], self.matrix.shape[1] + self.seen.shape[1]
        self.device = self.seen.device

    def __matmul__(self, other: Tensor) -> Tensor:
        cols = self.matrix.shape[1]
        return self.root.apply(self.ridge * self.matrix.times(other[:cols]) + self.seen @ other[cols:])

    def transposed(self, other: Tensor) -> Tensor:
        """The product of the transposed and another matrix."""
        scaled = self.root.apply(other)
        return torch.cat([self.ridge * self.matrix.transposed(scaled), self.seen.T @ scaled])

    @property
    def T(self) -> Transposed:  # noqa: N802 - as tensors have it
        return Transposed(self.transposed)


class Side(StrEnum):
    """Which half of a split layout."""

    ROWS = "rows"
    COLS = "cols"


@dataclass(frozen=True, eq=False)
class Half:
    """One side of a split layout, folded by `modes` in its metric, with the rank left open.

    `spectra` are the singular values at the edges below its top; `roots` the square roots of the modes' metric.
    """

    side: Side
    modes: tuple[int, ...]
    nested: Nested
    roots: list[Tensor] | None
    spectra: tuple[Tensor, ...]
    _known: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        split: RootSplit,
        side: Side,
        modes: Sequence[int],
        nested: Nested | None = None,
        *,
        max_parameters: int | None = None,
        max_rank: int | None = None,
    ) -> Half:
        """Fold one factor of a split matrix; what will be asked for within the half may be bounded."""
        nested = balanced(range(len(modes))) if nested is None else nested
        if len(modes) == 1:
            return cls(side, tuple(modes), nested, None, ())
        if side is Side.ROWS:
            factor, roots = split.left * split.values, split.metric.row_factors(modes)
        else:
            factor, roots = split.right, split.metric.col_factors(modes)
        half = cls(side, tuple(modes), nested, roots, ())
        whitened = half._whitened(factor)
        below = half._open_tree.nodes[: 2 * len(modes) - 2]
        # A leaf of rank r stores r numbers for each index of its mode.
        caps = [max(1, (max_parameters or mode**2) // mode) for mode in modes]
        caps = [min(cap, max_rank or cap) for cap in caps]
        # Some core holds as many numbers as the square of any rank.
        most = None if max_parameters is None else isqrt(max_parameters) + 1
        return replace(half, spectra=tuple(edge_spectra(whitened, below, [*caps, split.left.shape[1]], most)))

    def let_go(self) -> None:
        """Forget cores that were found."""
        self._known.clear()

    @property
    def _open_tree(self) -> DimensionTree:
        """The half's tree beside one more leaf for the open rank."""
        return DimensionTree((self.nested, len(self.modes)))

    def _whitened(self, factor: Float[Tensor, "n r"]) -> Tensor:
        folded = _fold(factor, self.modes)
        for axis, root in enumerate(self.roots or ()):
            folded = multiply(root.to(folded.dtype), folded, axis)
        return folded

    def cores(self, split: RootSplit, rank: int, ranks: Sequence[int]) -> list[Tensor]:
        """The cores of the half for these ranks (its nodes in post-order), the first `rank` columns only."""
        if len(self.modes) == 1:
            return [_fold((split.left if self.side is Side.ROWS else split.right)[:, :rank], self.modes)]
        # Candidates share their halves; what is kept of them is small.
        key = rank, *ranks[:-1]
        if key not in self._known:
            self._known[key] = self._cores(split, rank, ranks)
        return list(self._known[key])

    def _cores(self, split: RootSplit, rank: int, ranks: Sequence[int]) -> list[Tensor]:
        rows = self.side is Side.ROWS
        factor = (split.left if rows else split.right)[:, :rank]
        floor = 1e-8 * float(split.values[0]) or 1.0  # a zero matrix has nothing to scale by
        scale = split.values[:rank].clamp_min(floor) if rows else torch.ones_like(split.values[:rank])
        tree = self._open_tree
        goal = [*ranks[:-1], rank, rank, 1]
        whitened = self._whitened(factor * scale.to(factor.dtype))
        part = decompose(whitened, tree, ranks=goal).tensor.map(lambda core: core.double()).sliced(goal)
        nodes = tree.nodes[: 2 * len(self.modes) - 1]
        cores = [part.core(node) for node in nodes]
        above = part.core(tree.root)[:, :, 0] @ part.core(tree.nodes[-2]).T
        cores[-1] = (cores[-1] @ above) / scale
        if self.roots is not None:
            for node in nodes:
                if node.is_leaf:
                    cores[node.index] = torch.linalg.solve(self.roots[node.leaves[0]], cores[node.index])
        return cores


@dataclass(frozen=True, eq=False)
class SplitCandidate:
    """A split layout of a matrix: the root's split and the two halves, ready for any ranks."""

    split: RootSplit
    rows: Half
    cols: Half

    @cached_property
    def layout(self) -> Layout:
        metric = self.split.metric
        return Layout.split(
            self.rows.modes,
            self.cols.modes,
            rows=metric.rows,
            cols=metric.cols,
            row_tree=self.rows.nested,
            col_tree=self.cols.nested,
        )

    @cached_property
    def spectra(self) -> list[Tensor]:
        """The singular values at every edge: exact at the root, in the modes' metric within the halves."""
        values = self.split.values
        spectra: list[Tensor] = []
        for half in (self.rows, self.cols):
            spectra += [*half.spectra, values]
        return [*spectra, torch.linalg.vector_norm(values).reshape(1)]

    @cached_property
    def model(self) -> RankModel:
        """Costs and bounds of all ranks."""
        return RankModel(self.layout.tree, self.layout.shape, self.spectra, offset=self.split.lost)

    def let_go(self) -> None:
        """Forget what was found for the ranks that were asked for."""
        self.rows.let_go()
        self.cols.let_go()

    def truncate(self, ranks: Sequence[int]) -> HTMatrix:
        """The matrix of these ranks; each half is decomposed anew for the root's rank."""
        left, _ = self.layout.tree.root.children or (0, 0)
        rank = min(ranks[left], len(self.split.values))
        cores = self.rows.cores(self.split, rank, ranks[: left + 1])
        cores += self.cols.cores(self.split, rank, ranks[left + 1 : -1])
        cores = [core.double() for core in cores]
        cores.append(torch.eye(rank, dtype=torch.float64, device=cores[0].device).unsqueeze(-1))
        tensor = HTTensor.from_cores(self.layout.tree, cores)
        if self.model.parameters(tensor.ranks) > self.model.parameters(ranks):
            # Lower ranks than asked for (a matrix without full rank) cost more where an identity is lost.
            tensor = _padded(tensor, ranks)
        return HTMatrix(self.layout, tensor.compact())


@dataclass(frozen=True, eq=False)
class WholeCandidate:
    """Any other layout (paired ones): whitened by modes and decomposed as one tensor."""

    layout: Layout
    whitening: Whitening
    decomposition: Decomposition

    @classmethod
    def of(cls, target: WeightedMatrix, layout: Layout, *, cap: int | None) -> WholeCandidate:
        """Decompose a matrix in a layout."""
        whitening = Whitening.of(target, layout)
        folded = whitening.folded(target)
        return cls(layout, whitening, decompose(folded, layout.tree, max_rank=cap))

    @property
    def spectra(self) -> tuple[Tensor, ...]:
        """The singular values at every edge."""
        return self.decomposition.spectra

    @cached_property
    def model(self) -> RankModel:
        """Costs and bounds of all ranks."""
        return RankModel(self.layout.tree, self.layout.shape, self.spectra, offset=self.decomposition.discarded)

    def let_go(self) -> None:
        """Nothing was kept."""

    def truncate(self, ranks: Sequence[int]) -> HTMatrix:
        """The matrix of these ranks."""
        part = self.decomposition.tensor.sliced(ranks)
        cores = []
        for node in self.layout.tree.nodes:
            core = part.core(node)
            if node.is_leaf:
                core = self.whitening.removed(node.leaves[0], core)
            cores.append(core)
        return HTMatrix(self.layout, HTTensor.from_cores(self.layout.tree, cores).compact())


Candidate = SplitCandidate | WholeCandidate


def rank_cap(budget: int, rows: int, cols: int) -> int:
    """The largest rank at any edge that so many numbers can pay for (some core holds at least r^2)."""
    return max(1, min(rows, cols, isqrt(max(1, budget)) + 1))


def _padded(tensor: HTTensor, ranks: Sequence[int]) -> HTTensor:
    """The same tensor with zeros up to these ranks."""
    cores = []
    for node in tensor.tree.nodes:
        core = tensor.core(node)
        wanted = (*(ranks[child] for child in node.children or ()), ranks[node.index])
        missing = [a - b for a, b in zip(reversed(wanted), reversed(core.shape), strict=False)]
        cores.append(F.pad(core, [by for after in missing for by in (0, after)]))
    return HTTensor.from_cores(tensor.tree, cores)


def _fold(factor: Tensor, modes: Sequence[int]) -> Tensor:
    size = 1
    for mode in modes:
        size *= mode
    if size == len(factor) and factor.is_contiguous() and factor.numel() > LARGE:
        return factor.reshape(*modes, factor.shape[1])
    return F.pad(factor, (0, 0, 0, size - len(factor))).reshape(*modes, factor.shape[1])

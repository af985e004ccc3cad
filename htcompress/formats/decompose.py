"""From a tensor to the cores of a format, by tensorly.

Large tensors are reduced first to the leading subspaces of their modes, where everything that follows is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import isqrt, prod

import tensorly
import torch
from tensorly.decomposition import tensor_ring, tensor_train, tucker
from torch import Tensor

from htcompress.formats.format import Format
from htcompress.formats.structure import BlockTerm, Ring, Structure
from htcompress.matrix.blocks import working
from htcompress.matrix.layout import Layout
from htcompress.matrix.whitening import multiply

_NUMBERS = 60_000  # of a reduced tensor
_TUCKER_ROUNDS = 2
_MOST_BLOCKS = 12


@dataclass(frozen=True, eq=False)
class Reduced:
    """A tensor as a smaller one times orthonormal bases of its modes, (size, kept).

    Attributes:
        lost: the squared error of that.
    """

    core: Tensor
    bases: tuple[Tensor, ...]
    lost: float

    @classmethod
    def of(cls, tensor: Tensor) -> Reduced:
        """Project on the leading singular subspaces, in float64."""
        tensor = working(tensor)
        total = float(tensor.double().square().sum())
        most = max(2, int(_NUMBERS ** (1 / tensor.ndim)))
        bases = []
        for axis in range(tensor.ndim):
            unfolded = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
            gram = (unfolded @ unfolded.T).double()
            _, vectors = torch.linalg.eigh(gram)
            basis = vectors.flip(1)[:, : min(most, *unfolded.shape)]
            bases.append(basis)
            tensor = multiply(basis.T.to(tensor.dtype), tensor, axis)
        core = tensor.double()
        return cls(core, tuple(bases), max(0.0, total - float(core.square().sum())))

    def spectra(self) -> list[Tensor]:
        """The singular values where the modes up to k are parted from the rest, k = 0, 1, ..."""
        shape = self.core.shape
        return [torch.linalg.svdvals(self.core.reshape(prod(shape[: k + 1]), -1)) for k in range(len(shape) - 1)]


def decompose(reduced: Reduced, structure: Structure) -> list[Tensor]:
    """The cores of a structure for a reduced tensor, its bases multiplied back in; float64."""
    with tensorly.backend_context("pytorch"), reduced.core.device:
        if isinstance(structure, BlockTerm):
            return _block_terms(reduced, structure)
        assert isinstance(structure, Ring)
        ranks = structure.ranks
        if structure.format is Format.TT:
            found = tensor_train(reduced.core, rank=[1, *ranks[1:], 1]).factors
        else:
            found = tensor_ring(reduced.core, rank=[*ranks, ranks[0]]).factors
    cores = [multiply(basis, core, 1) for basis, core in zip(reduced.bases, found, strict=True)]
    return [_padded(core, shape) for core, shape in zip(cores, structure.shapes, strict=True)]


def _block_terms(reduced: Reduced, structure: BlockTerm) -> list[Tensor]:
    """One Tucker tensor after the other, each of what the ones before it have left."""
    blocks, rank = structure.ranks
    left = reduced.core
    factors: list[list[Tensor]] = [[] for _ in reduced.bases]
    cores = []
    for _ in range(blocks):
        ranks = [min(rank, size) for size in left.shape]
        core, own = tucker(left, rank=ranks, n_iter_max=_TUCKER_ROUNDS, tol=1e-6)
        left = left - tensorly.tucker_to_tensor((core, own))
        cores.append(_padded(core, (rank,) * left.ndim))
        for k, factor in enumerate(own):
            factors[k].append(_padded(reduced.bases[k] @ factor, (len(reduced.bases[k]), rank)))
    return [*(torch.stack(own, dim=-1) for own in factors), torch.stack(cores, dim=-1)]


def structures_within(form: Format, layout: Layout, reduced: Reduced, budget: int) -> list[Structure]:
    """The structures of a format worth trying that store at most so many numbers."""
    if form is Format.BT:
        return list(_block_structures(layout, budget))
    start = (1,) * layout.tree.order if form is Format.TT else _even_ring(layout, reduced, budget)
    if Ring(layout, start).parameters > budget:
        return []
    return [Ring(layout, _grown(layout, start, reduced, budget))]


def smallest(form: Format, layout: Layout) -> int:
    """The fewest numbers that a format stores in a layout."""
    ones = BlockTerm(layout, (1, 1)) if form is Format.BT else Ring(layout, (1,) * layout.tree.order)
    return ones.parameters


def _block_structures(layout: Layout, budget: int) -> Sequence[Structure]:
    found = []
    for rank in (1, 2, 3, 4, 6, 8):
        blocks = budget // BlockTerm(layout, (1, rank)).parameters
        if blocks >= 1:
            found.append(BlockTerm(layout, (min(blocks, _MOST_BLOCKS), rank)))
    return found


def _even_ring(layout: Layout, reduced: Reduced, budget: int) -> tuple[int, ...]:
    """Equal ranks, as large as fit; the first two are the factors of a rank of the first mode."""
    d = layout.tree.order
    first = reduced.core.shape[0]
    ranks = (1,) * d
    for r in count(2):
        tried = (min(r, isqrt(first)),) * min(2, d) + (r,) * (d - 2)
        if Ring(layout, tried).parameters > budget or r > max(reduced.core.shape):
            return ranks
        ranks = tried
    raise AssertionError


def _grown(layout: Layout, start: tuple[int, ...], reduced: Reduced, budget: int) -> tuple[int, ...]:
    """Ranks raised one at a time, where the error falls most for the numbers spent.

    The bonds of a tensor train are known by their singular values. Those of a ring are taken alike, but the
    first two, which stay.
    """
    ranks = list(start)
    d = len(ranks)
    spectra = reduced.spectra()
    ring = start[0] > 1
    shape = reduced.core.shape
    while True:
        best: tuple[float, int] | None = None
        own = Ring(layout, tuple(ranks)).parameters
        for k in range(2 if ring else 1, d):
            values = spectra[k - 1]
            used = ranks[k] * (ranks[0] if ring else 1)
            if used >= len(values) or (not ring and ranks[k] >= ranks[k - 1] * shape[k - 1]):
                continue
            grown = Ring(layout, (*ranks[:k], ranks[k] + 1, *ranks[k + 1 :])).parameters
            if grown > budget:
                continue
            gain = float(values[used : used + (ranks[0] if ring else 1)].square().sum()) / (grown - own)
            if best is None or gain > best[0]:
                best = gain, k
        if best is None:
            return tuple(ranks)
        ranks[best[1]] += 1


def _padded(core: Tensor, shape: Sequence[int]) -> Tensor:
    """A core with zeros up to the sizes of a structure, where the tensor has not the rank."""
    missing = [
        by for wanted, size in zip(reversed(shape), reversed(core.shape), strict=True) for by in (0, wanted - size)
    ]
    return torch.nn.functional.pad(core, missing)

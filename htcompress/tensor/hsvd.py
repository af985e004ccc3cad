"""HT-SVD: from a dense tensor to its Hierarchical Tucker form.

Leaves to root, projecting at once after each node so that the tensor shrinks. Singular bases are
eigenvectors of Gram matrices, accumulated in float64 where the tolerance needs it: float32 Grams fail
below a relative tolerance of about 1e-3, float64 Grams below 1e-8, where QR takes their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import frexp, isfinite, isqrt, prod, sqrt

import torch
from torch import Tensor

from htcompress.errors import RequestError, ShapeError
from htcompress.tensor.ht import HTTensor
from htcompress.tensor.precision import share_of_ranks
from htcompress.tensor.projection import Axes, Projection, project
from htcompress.tensor.ranks import RankModel, parameter_count, ranks_for_budget, ranks_for_error
from htcompress.tensor.tree import DimensionTree

_TRIED = 1 << 16  # numbers of a tensor that is decomposed anew for each half of a budget: milliseconds
_SMALL = 1 << 22  # numbers up to which float64 costs nothing worth saving
_SQUARED = 1e-6  # relative error below which Gram matrices are not trusted: their square roots round at 1e-8 and more


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
    modes: Sequence[Axes] | None = None,
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
        max_parameters: the stored numbers that are not exceeded (identities are not stored). Ranks follow a bound on
            the error; of small tensors halves of the budget are tried, too, so that twice a budget is never worse.
        max_rank: a cap on every rank, in addition.
        modes: for each mode the axes of `x` that make it up, the last one the fastest; one each if None. A
            large tensor that lies in memory in another order need not be copied for it.

    Returns:
        the compact HT tensor, with the dtype of `x` (float32 for half precision).

    Raises:
        ShapeError: the tree does not fit the tensor.
        RequestError: more than one goal, an error that is negative or smaller than the result's precision can hold,
            fewer parameters than rank one needs, or numbers that are not finite.

    Source: Grasedyck 2010; sequential projection as in Vannieuwenhoven et al. 2012.
    """
    if sum(goal is not None for goal in (ranks, rtol, max_parameters)) > 1:
        raise RequestError("Give one of ranks, rtol and max_parameters, not several.")
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    share = 0.0 if rtol is None else share_of_ranks(rtol, dtype, len(tree.nodes))
    given = x
    x, unit = _in_range(x)
    found = _decompose(
        x,
        tree,
        rtol=None if rtol is None else share,
        max_parameters=max_parameters,
        max_rank=max_rank,
        ranks=ranks,
        modes=modes,
    )
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
        left_over = max(0.0, (share * found.norm) ** 2 - found.discarded)
        chosen = ranks_for_error(tree, shape, found.spectra, left_over)
        if max_rank is None and found.model.parameters(chosen) > parameter_count(tree, shape, _full_ranks(tree, shape)):
            # High ranks can cost more than full ones, whose identities are free.
            found = _decompose(x, tree, modes=modes)
            chosen = found.tensor.ranks
    made = found.truncate(chosen)
    if unit != 1.0:
        # Each core takes its share, so that none leaves the range.
        share_of_unit = unit ** (1 / len(made.stored))
        made = made.map(lambda core: share_of_unit * core)
    made = made.map(lambda core: core.to(dtype))
    if max_parameters is not None and x.numel() <= _TRIED:
        half, least = max_parameters // 2, parameter_count(tree, shape, (1,) * len(tree.nodes))
        if half >= least:
            folded = _folded(given, modes)
            smaller = ht_svd(given, tree, max_parameters=half, max_rank=max_rank, modes=modes)
            if smaller.relative_error(folded) < made.relative_error(folded):
                return smaller
    return made


def _folded(x: Tensor, modes: Sequence[Axes] | None) -> Tensor:
    """The tensor with one axis for each mode."""
    if modes is None:
        return x
    parted = x.permute([axis for mode in modes for axis in mode])
    return parted.reshape([prod(x.shape[axis] for axis in mode) for mode in modes])


def _in_range(x: Tensor) -> tuple[Tensor, float]:
    """The tensor in a unit in which squares of its numbers stay within the range of its precision, and that unit.

    A copy is made only of a tensor that is out of it. Raises `RequestError` where numbers are not finite.
    """
    if not x.is_floating_point() or not x.numel():
        return x, 1.0
    largest = max(abs(float(bound)) for bound in torch.aminmax(x.detach()))
    if not isfinite(largest):
        raise RequestError(
            f"The tensor of shape {tuple(x.shape)} holds numbers that are not finite; correct them first."
        )
    limit = 1e-100 if x.dtype == torch.float64 else 1e-10
    if largest == 0.0 or limit <= largest <= 1 / limit:
        return x, 1.0
    unit = 2.0 ** frexp(largest)[1]
    return (x.double() / unit).to(x.dtype), unit


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
    modes: Sequence[Axes] | None = None,
) -> Decomposition:
    """The canonical form of a dense tensor, as exact as the goal needs; arguments as `ht_svd`.

    No rank above sqrt(max_parameters) + 1 can be part of a tensor that stores so few numbers (some core
    holds at least r^2), which caps the work; without a goal the form is exact.
    """
    x, unit = _in_range(x)
    found = _decompose(x, tree, rtol=rtol, max_parameters=max_parameters, max_rank=max_rank, ranks=ranks, modes=modes)
    if unit == 1.0:
        return found
    spectra = tuple(unit * values for values in found.spectra)
    return Decomposition(found.tensor * unit, spectra, unit * found.norm, unit**2 * found.discarded)


def _decompose(
    x: Tensor,
    tree: DimensionTree,
    *,
    rtol: float | None = None,
    max_parameters: int | None = None,
    max_rank: int | None = None,
    ranks: Sequence[int] | None = None,
    modes: Sequence[Axes] | None = None,
) -> Decomposition:
    """`decompose` of a tensor whose squares are in range."""
    axes: list[Axes] = [(k,) for k in range(x.ndim)] if modes is None else [tuple(mode) for mode in modes]
    if len(axes) != tree.order:
        raise ShapeError(f"A tensor of order {len(axes)} does not fit a tree over {tree.order} modes.")
    if sorted(axis for mode in axes for axis in mode) != list(range(x.ndim)):
        raise ShapeError(f"The modes {axes} do not take each of the tensor's {x.ndim} axes once.")
    if not x.is_floating_point():
        raise ShapeError(f"HT-SVD needs floating-point numbers; found {x.dtype}.")
    fine = x.dtype == torch.float64 or x.numel() <= _SMALL or (rtol is not None and rtol < 1e-3)
    if x.numel() <= _SMALL:
        x = x.double()
    elif x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    caps = [isqrt(max(0, max_parameters)) + 1] if max_parameters is not None else []
    caps += [max(ranks)] if ranks is not None else []
    caps += [max_rank] if max_rank is not None else []
    edges = max(1, 2 * tree.order - 3)
    squaring = rtol is None or rtol >= _SQUARED
    state = Projection(x, axes, min(caps, default=None), (rtol or 0.0) ** 2 / edges, fine, squaring)
    cores = project(state, tree.nodes)
    tensor, spectra = HTTensor.from_cores(tree, [core.double() for core in cores]).canonical()
    return Decomposition(tensor, spectra, sqrt(state.squared), state.discarded)

"""The error of a matrix in its metric as a function of one of its cores, all others fixed: a quadratic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import opt_einsum
import torch
from torch import Tensor

from htcompress.matrix.layout import Layout
from htcompress.matrix.metric import RowRoot
from htcompress.matrix.network import Network, equation
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.side_by_side import cached_property
from htcompress.storage.feedback import unit_lower

ROWS_DAMPED, COLS_DAMPED = 0.1, 0.01
"""What is added to a moment before errors are passed on by it, as a part of its mean eigenvalue: moments are
estimates, that of gradients the rougher one. Letters to phonemes in 3 bits keep .6425 of words, with .01 for both
.6405."""

_WIDEST_MOMENT = 4096
"""The most columns whose moment is formed to pass errors on by."""

_WHOLE_CORE = 1536
"""The most numbers of a core whose quadratic is formed; that of a larger one is taken for a product."""

_ON_THE_WAY = 1 << 24
"""The most numbers that a contraction of two copies of a factor may come to on the way: 128 MB."""

_SINGULAR, _SINGULAR_NARROW = 1e-9, 1e-5
"""Of the mean eigenvalue: keeps what decides nothing where it is. The second where float32's rounding decides it."""

Operand = tuple[Tensor, tuple[str, ...]]
"""A tensor and the names of its axes."""


@dataclass(frozen=True, eq=False)
class Moment:
    """A symmetric matrix, and what passes errors on by it."""

    matrix: Tensor

    @cached_property
    def lower(self) -> Tensor:
        """Unit lower triangular, see `unit_lower`."""
        return unit_lower(self.matrix)[0]


@dataclass(frozen=True)
class CoreProblem:
    """What a core should be, and what an error of it counts: ||L_rows^T E L_cols||^2 or nearly so.

    Attributes:
        best: the numbers of least error, as a matrix (m, n).
        rows, cols: the metric of its rows (m, m) and its columns (n, n); None: the identity.
    """

    best: Tensor
    rows: Moment | None
    cols: Moment | None


@dataclass(frozen=True, eq=False)
class Feedback:
    """How the errors of a matrix are passed on in its metric: found once for all that is rounded in it."""

    target: WeightedMatrix

    @cached_property
    def rows(self) -> Moment | None:
        """G; None: it passes nothing on."""
        moment = self.target.metric.row_root.moment
        return None if moment is None else Moment(damped(moment, ROWS_DAMPED))

    @cached_property
    def cols(self) -> Moment | None:
        """A; None: it is the identity, or too large to be formed."""
        metric = self.target.metric
        if metric.inputs is None or metric.cols > _WIDEST_MOMENT:
            return None
        return Moment(damped(metric.input_moment, COLS_DAMPED))

    @property
    def dense(self) -> CoreProblem:
        """The problem of the dense matrix, of which this is a copy in float64."""
        return CoreProblem(self.target.matrix.dense().double(), self.rows, self.cols)


def damped(moment: Tensor, part: float) -> Tensor:
    """A moment with a part of its mean eigenvalue added to each."""
    size = float(moment.diagonal().mean()) or 1.0
    return moment + part * size * torch.eye(len(moment), dtype=moment.dtype)


def core_problem(matrix: StoredMatrix, feedback: Feedback, t: int) -> CoreProblem:
    """The problem of core `t` of a product of two factors."""
    target = feedback.target
    networks, factors = matrix.factor_networks, target.factors_of(matrix)
    if networks is None or factors is None:
        raise RuntimeError("Only a product of two factors is taken core by core.")
    rows, cols = factors
    metric, index = target.metric, 0 if t in networks[0].cores else 1
    root = metric.row_root
    weigh: Callable[[Tensor], Tensor]
    # In the factor F of which the core is a part: tr(F^T M F S) - 2 tr(T^T M F).
    if index == 0:
        through = metric.through(cols)
        other, towards, weigh = (cols.T @ through).double(), target.matrix.times(through).double(), root.weigh
    else:
        weighed = root.weigh(rows)
        other, towards, weigh = rows.T @ weighed, target.matrix.transposed(weighed.to(cols.dtype)), metric.through
    every, network = matrix.operands(), networks[index]
    core = every[t]
    stored = [k for k in network.cores if isinstance(matrix.cores[k], Tensor)]
    if stored == [t] and core.numel() == factors[index].numel():
        # The core is F itself: M F S = M T, whatever M.
        other = damped(other, _SINGULAR)
        own = feedback.rows if index == 0 else feedback.cols
        return CoreProblem(torch.linalg.solve(other, towards.double().T).T, own, Moment(other))
    weights = _of_rows(root) if index == 0 else _Weights(metric.seen_inputs, ridge=metric.shrinkage[1])
    identities = [not isinstance(matrix.cores[k], Tensor) for k in network.cores]
    factor = _Factor.of(network.network, [every[k] for k in network.cores], identities, network.cores.index(t), other)
    if core.numel() <= _WHOLE_CORE:
        moment = factor.moment(weights, range(len(factor.axes)))
        singular = _SINGULAR if cols.dtype is torch.float64 else _SINGULAR_NARROW
        missed = weigh(towards - factors[index] @ other.to(towards))
        step = torch.linalg.solve(damped(moment, singular), factor.gradient(missed))
        return CoreProblem((core.reshape(-1) + step)[:, None], Moment(damped(moment, COLS_DAMPED)), None)
    # As if the quadratic were a product of one of the last axis and one of all others.
    last = max(k for k, size in enumerate(factor.sizes) if size == core.shape[-1])
    others = [k for k in range(len(factor.axes)) if k != last]
    return CoreProblem(
        core.reshape(-1, core.shape[-1]),
        Moment(damped(factor.moment(weights, others), COLS_DAMPED)),
        Moment(damped(factor.moment(weights, [last]), _SINGULAR)),
    )


@dataclass(frozen=True, eq=False)
class _Weights:
    """M, the metric of a factor's rows, in parts that are added; what is None is not there.

    Attributes:
        seen: Y (n, size) with Y^T Y.
        ridge: times the identity.
        diagonal: (size,). Written out as Y, one of 8,192 rows would take gigabytes on the way.
    """

    seen: Tensor | None = None
    ridge: float = 0.0
    diagonal: Tensor | None = None


def _of_rows(root: RowRoot) -> _Weights:
    if root.root is None:
        return _Weights(ridge=1.0)
    return _Weights(root.root) if root.root.ndim == 2 else _Weights(diagonal=root.root.square())


@dataclass(frozen=True, eq=False)
class _Factor:
    """A factor as a contraction of a core in question with others.

    Attributes:
        layout: the factor's.
        axes, sizes: of the core in question, those that are one by way of an identity by one name.
        others: the other cores that are no such identity.
        rank: the axis that meets the other factor.
        other: S (r, r), the Gram matrix of the other factor.
    """

    layout: Layout
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    others: tuple[Operand, ...]
    rank: str
    other: Tensor

    @classmethod
    def of(
        cls, network: Network, cores: Sequence[Tensor], identities: Sequence[bool], at: int, other: Tensor
    ) -> _Factor:
        """The factor of a network with core `at` in question.

        Written out, an identity between two axes would have what is contracted carry both: times the rank for nothing.
        """
        name: dict[str, str] = {}
        kept = []
        for k, (core, legs, shape) in enumerate(zip(cores, network.legs, network.shapes, strict=True)):
            if k == at:
                continue
            joined = [name.get(leg, leg) for leg, size in zip(legs, shape, strict=True) if size > 1]
            if identities[k] and len(joined) == 2:
                # A mode, and an axis of the core in question, keep their names.
                first, second = sorted(joined, key=lambda leg: (leg[0] != "m", leg not in network.legs[at]))
                name = {leg: first if now == second else now for leg, now in name.items()} | {second: first}
            else:
                kept.append((core.reshape(shape), legs))
        rank = f"n{network.layout.tree.order - 1}"

        def named(legs: Sequence[str]) -> tuple[str, ...]:
            return tuple(name.get(leg, leg) for leg in legs)

        others = tuple((tensor, named(legs)) for tensor, legs in kept)
        return cls(network.layout, named(network.legs[at]), network.shapes[at], others, named([rank])[0], other)

    @property
    def _modes(self) -> tuple[str, ...]:
        return tuple(f"m{k}" for k in range(self.layout.tree.order))

    def gradient(self, apart: Tensor) -> Tensor:
        """Half of the error's gradient at the core, turned round, flat: what `apart` (size, r) is by way of it."""
        others = [(tensor.to(apart), legs) for tensor, legs in self.others]
        return _contracted([self._folded(apart.T, self.rank), *others], self.axes).reshape(-1).double()

    def moment(self, weights: _Weights, kept: Sequence[int]) -> Tensor:
        """The quadratic over some axes of the core, a matrix; its trace over all others."""
        axes = [self.axes[k] for k in kept]
        size = prod(self.sizes[k] for k in kept)
        traced = [axis for axis in self.axes if axis not in axes]
        out = (*axes, *(f"{axis}'" for axis in axes))
        total = torch.zeros(size, size, dtype=torch.float64)
        modes = self._modes
        # What is one axis of both copies is two of the core's, and the same.
        sizes = dict(zip(self.axes, self.sizes, strict=True))
        eyes = [(torch.eye(sizes[axis], dtype=torch.float64), (axis, f"{axis}'")) for axis in modes if axis in axes]

        tied = _tied((self.other, (self.rank, f"{self.rank}'")), traced)

        def added(factor: Sequence[Operand], summed: Sequence[str], between: Sequence[Operand]) -> Tensor:
            own = tuple(dict.fromkeys([*summed, *self.axes, self.rank]))
            same = dict.fromkeys([*summed, *traced])
            return _squared(factor, own, same, between, out).reshape(size, size)

        if weights.seen is not None:
            total += added([self._folded(weights.seen, "s"), *self.others], ("s",), [tied])
        if weights.diagonal is not None:
            roots, legs = self._folded(weights.diagonal.sqrt()[None], "s")
            total += added([(roots[0], legs[1:]), *self.others], modes, [*eyes, tied])
        if weights.ridge > 0:
            # Padding counts like the rest: what stands for it alone is held where it is.
            lost = prod(sizes[axis] for axis in modes if axis in traced)
            total += weights.ridge * lost * added(self.others, modes, [*eyes, tied])
        return total

    def _folded(self, vectors: Tensor, name: str) -> Operand:
        """Vectors (n, size) in the factor's row modes, padding appended."""
        layout = self.layout
        missing = prod(layout.row_modes) - layout.rows
        padded = torch.nn.functional.pad(vectors, (0, missing))
        return padded.reshape(len(vectors), *layout.row_modes), (name, *self._modes)


def _primed(operands: Sequence[Operand], same: Mapping[str, object]) -> list[Operand]:
    """A second copy, all of whose axes are others but for some."""
    return [(tensor, tuple(leg if leg in same else f"{leg}'" for leg in legs)) for tensor, legs in operands]


def _tied(between: Operand, traced: Sequence[str]) -> Operand:
    """The Gram matrix between two copies; its diagonal where their axis is one."""
    tensor, (first, second) = between
    return (tensor.diagonal(), (first,)) if first in traced else (tensor, (first, second))


def _squared(
    operands: Sequence[Operand],
    own: Sequence[str],
    same: Mapping[str, object],
    between: Sequence[Operand],
    out: Sequence[str],
) -> Tensor:
    """What operands come to, times itself: two copies that share the axes `same`, and what stands `between` them.

    In one go, where no more than `_ON_THE_WAY` numbers come of it on the way. Elsewhere each copy is joined first, by
    parts of an axis that is summed over; `own` are the axes of a copy.
    """
    copies = [*operands, *_primed(operands, same), *between]
    sizes = {leg: size for tensor, legs in operands for leg, size in zip(legs, tensor.shape, strict=True)}
    summed = [leg for leg in same if leg in sizes and leg not in out]
    if not summed or _on_the_way(copies, out) <= _ON_THE_WAY:
        return _contracted(copies, out)
    numbers = prod(sizes.get(leg, 1) for leg in own)
    along = max(summed, key=lambda leg: sizes[leg])
    most = max(1, sizes[along] * _ON_THE_WAY // numbers)
    total: Tensor | float = 0.0
    for start in range(0, sizes[along], most):
        part = [_sliced(operand, along, start, most) for operand in operands]
        copy = _joined(part, own)
        total = total + _contracted(
            [copy, *_primed([copy], same), *(_sliced(o, along, start, most) for o in between)], out
        )
    return torch.as_tensor(total)


def _on_the_way(operands: Sequence[Operand], out: Sequence[str]) -> float:
    """The most numbers that a contraction comes to at a time."""
    known, legs = _known(operands, out), [legs for _, legs in operands]
    shapes = [tuple(tensor.shape) for tensor, _ in operands]
    _, info = opt_einsum.contract_path(equation(legs, known), *shapes, shapes=True, optimize="auto")
    return float(info.largest_intermediate)


def _sliced(operand: Operand, along: str, start: int, most: int) -> Operand:
    """An operand with a part of an axis, where it has that."""
    tensor, legs = operand
    if along not in legs:
        return operand
    axis = legs.index(along)
    return tensor.narrow(axis, start, min(most, tensor.shape[axis] - start)), legs


def _known(operands: Sequence[Operand], out: Sequence[str]) -> tuple[str, ...]:
    """The axes of `out` that operands have."""
    have = {leg for _, legs in operands for leg in legs}
    return tuple(leg for leg in dict.fromkeys(out) if leg in have)


def _contracted(operands: Sequence[Operand], out: Sequence[str]) -> Tensor:
    """A contraction over `out`; axes that no operand has are of size one, and left out."""
    return _joined(operands, out)[0]


def _joined(operands: Sequence[Operand], out: Sequence[str]) -> Operand:
    """One operand in the place of several, with the axes of `out` that they have."""
    tensors, legs = zip(*operands, strict=True)
    known = _known(operands, out)
    return opt_einsum.contract(equation(legs, known), *tensors, backend="torch", optimize="auto"), known

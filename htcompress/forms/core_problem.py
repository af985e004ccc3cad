"""The error of a matrix in its metric as a function of one of its cores, all others fixed: a quadratic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import opt_einsum
import torch
from torch import Tensor

from htcompress.matrix.metric import RowRoot
from htcompress.matrix.network import Network, equation
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.storage.feedback import unit_lower

ROWS_DAMPED, COLS_DAMPED = 0.1, 0.01
"""What is added to a moment before errors are passed on by it, as a part of its mean eigenvalue: moments are
estimates, that of gradients the rougher one. Letters to phonemes in 3 bits keep .6425 of words, with .01 for both
.6405."""

_WIDEST_MOMENT = 4096
"""The most columns whose moment is formed to pass errors on by."""

_WHOLE_CORE = 1536
"""The most numbers of a core whose quadratic is formed; that of a larger one is taken for a product."""

_SINGULAR = 1e-9
"""Of the mean eigenvalue: keeps what decides nothing where it is."""

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
        root = self.target.metric.row_root.root
        return None if root is None or root.ndim == 1 else Moment(damped(root @ root, ROWS_DAMPED))

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
    networks, factors = matrix.factor_networks, matrix.factors()
    if networks is None or factors is None:
        raise RuntimeError("Only a product of two factors is taken core by core.")
    rows, cols = factors
    metric, index = target.metric, 0 if t in networks[0].cores else 1
    root = metric.row_root

    def row_weighed(factor: Tensor) -> Tensor:
        return root.apply(root.apply(factor))

    # In the factor F of which the core is a part: tr(F^T M F S) - 2 tr(T^T M F).
    if index == 0:
        through = metric.through(cols)
        other, towards, weigh = cols.T @ through, target.matrix.times(through), row_weighed
    else:
        weighed = row_weighed(rows)
        other, towards, weigh = rows.T @ weighed, target.matrix.transposed(weighed), metric.through
    every, network = matrix.operands(), networks[index]
    core = every[t]
    stored = [k for k in network.cores if isinstance(matrix.cores[k], Tensor)]
    if stored == [t] and core.numel() == factors[index].numel():
        # The core is F itself: M F S = M T, whatever M.
        other = damped(other, _SINGULAR)
        own = feedback.rows if index == 0 else feedback.cols
        return CoreProblem(torch.linalg.solve(other, towards.T).T, own, Moment(other))
    weights = _of_rows(root) if index == 0 else _Weights(metric.seen_inputs, ridge=metric.shrinkage[1])
    place = network.cores.index(t)
    factor = _Factor(network.network, [every[k] for k in network.cores], place, other)
    if core.numel() <= _WHOLE_CORE:
        moment = factor.moment(weights, range(len(factor.axes)))
        step = torch.linalg.solve(damped(moment, _SINGULAR), factor.gradient(weigh(towards - factors[index] @ other)))
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
    """A factor as a contraction of cores, of which number `at` is in question.

    Attributes:
        other: S (r, r), the Gram matrix of the other factor.
    """

    network: Network
    operands: Sequence[Tensor]
    at: int
    other: Tensor

    @property
    def axes(self) -> tuple[str, ...]:
        """Those of the core in question."""
        return self.network.legs[self.at]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their sizes."""
        return self.network.shapes[self.at]

    @property
    def _modes(self) -> tuple[str, ...]:
        return tuple(f"m{k}" for k in range(self.network.layout.tree.order))

    @property
    def _rank(self) -> str:
        """The axis that meets the other factor."""
        return f"n{self.network.layout.tree.order - 1}"

    def gradient(self, apart: Tensor) -> Tensor:
        """Half of the error's gradient at the core, turned round, flat: what `apart` (size, r) is by way of it."""
        found = _contracted([self._folded(apart.T, self._rank), *self._others()], self.axes)
        return found.reshape(-1)

    def moment(self, weights: _Weights, kept: Sequence[int]) -> Tensor:
        """The quadratic over some axes of the core, a matrix; its trace over all others."""
        axes = [self.axes[k] for k in kept]
        size = prod(self.sizes[k] for k in kept)
        traced = [axis for axis in self.axes if axis not in axes]
        out = (*axes, *(f"{axis}'" for axis in axes))
        total = torch.zeros(size, size, dtype=torch.float64)
        tied = _tied((self.other, (self._rank, f"{self._rank}'")), traced)
        if weights.seen is not None:
            own = _joined([self._folded(weights.seen, "s"), *self._others()], ["s", *self.axes, self._rank])
            copies = [own, *_primed([own], dict.fromkeys(["s", *traced]))]
            total += _contracted([*copies, tied], out).reshape(size, size)
        # What is one axis of both copies is two of the core's, and the same.
        same = dict.fromkeys([*self._modes, *traced])
        sizes = dict(zip(self.axes, self.sizes, strict=True))
        both = [axis for axis in self._modes if axis in axes]
        eyes = [(torch.eye(sizes[axis], dtype=torch.float64), (axis, f"{axis}'")) for axis in both]
        if weights.diagonal is not None:
            roots, legs = self._folded(weights.diagonal.sqrt()[None], "s")
            own = _joined([(roots[0], legs[1:]), *self._others()], [*self._modes, *self.axes, self._rank])
            total += _contracted([own, *_primed([own], same), *eyes, tied], out).reshape(size, size)
        if weights.ridge > 0:
            # Padding counts like the rest: what stands for it alone is held where it is.
            lost = prod(sizes[axis] for axis in self._modes if axis in traced)
            copies = [*self._others(), *_primed(self._others(), same)]
            total += weights.ridge * lost * _contracted([*copies, *eyes, tied], out).reshape(size, size)
        return total

    def _others(self) -> list[Operand]:
        found = zip(self.operands, self.network.legs, self.network.shapes, strict=True)
        return [(core.reshape(shape), legs) for k, (core, legs, shape) in enumerate(found) if k != self.at]

    def _folded(self, vectors: Tensor, name: str) -> Operand:
        """Vectors (n, size) in the factor's row modes, padding appended."""
        layout = self.network.layout
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


def _contracted(operands: Sequence[Operand], out: Sequence[str]) -> Tensor:
    """A contraction over `out`; axes that no operand has are of size one, and left out."""
    return _joined(operands, out)[0]


def _joined(operands: Sequence[Operand], out: Sequence[str]) -> Operand:
    """One operand in the place of several, with the axes of `out` that they have.

    Two copies that are joined first are multiplied as matrices. Contracted in one go, what comes of them on the way may
    have the axes of both at once: gigabytes for a core of 500 numbers in a layer of 8,192 rows.
    """
    have = {leg for _, legs in operands for leg in legs}
    tensors, legs = zip(*operands, strict=True)
    known = tuple(leg for leg in dict.fromkeys(out) if leg in have)
    return opt_einsum.contract(equation(legs, known), *tensors, backend="torch", optimize="auto"), known

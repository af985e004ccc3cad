"""The metric of a matrix's error: what enters the matrix, and what its output does to the model's.

The squared error of W' is E ||G^(1/2) (W - W') x||^2 with x the input of the matrix and G the second moment
of the gradient at its output. Without data both are identities, and the error is the plain one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from htcompress.errors import ShapeError
from htcompress.matrix.blocks import Blocks
from htcompress.matrix.inputs import Inputs
from htcompress.side_by_side import cached_property

EXACT_LIMIT = 2048
"""The largest number of rows whose second moment is formed; beyond it, its diagonal."""

SEEN = 1024
"""Inputs that stand for all where a moment is needed of what comes of them on the way."""

_FLOOR = 1e-6
"""The least ridge of a moment, as a part of its mean eigenvalue: keeps it invertible in float32's precision."""


def shrinkage_of(count: int, size: int, trace: float, square: float) -> float:
    """How much of a second moment of so many samples is to be the identity, in units of its mean eigenvalue; at most 1.

    Oracle approximating shrinkage (Chen et al. 2010).

    Args:
        size: of the moment, (size, size).
        trace, square: its trace, and its squared norm.
    """
    above = (1 - 2 / size) * square + trace**2
    below = (count + 1 - 2 / size) * (square - trace**2 / size)
    return 1.0 if below <= 0 else min(1.0, above / below)


@dataclass(frozen=True, eq=False)
class Metric:
    """The metric of a `rows` x `cols` matrix; the identity where a part is None.

    Args:
        gradients: second moment of the gradients at the matrix's output: (rows, rows), or (rows,), its
            diagonal, where the matrix has more than `EXACT_LIMIT` rows.
        inputs: what enters the matrix, or (samples, cols) of it; centred where the bias takes up the mean error.
    """

    rows: int
    cols: int
    gradients: Tensor | None = None
    inputs: Inputs | None = None
    _roots: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    _of_rows: dict[tuple[int, ...], Any] = field(default_factory=dict, init=False, repr=False)
    _col_triangles: dict[tuple[int, ...], list[Triangle]] = field(default_factory=dict, init=False, repr=False)
    _row_triangles: dict[tuple[int, ...], list[Triangle]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.inputs, Tensor):
            object.__setattr__(self, "inputs", Inputs.of(self.inputs))
        if self.gradients is not None and self.gradients.shape not in ((self.rows,) * 2, (self.rows,)):
            raise ShapeError(f"Gradients of a matrix of {self.rows} rows; found {tuple(self.gradients.shape)}.")
        if self.inputs is not None and self.inputs.cols != self.cols:
            raise ShapeError(f"Inputs of a matrix of {self.cols} columns; found {self.inputs.cols}.")

    def of_columns(self, cols: int, inputs: Inputs | None) -> Metric:
        """That of a matrix of the same rows and other columns; what is found out about the rows is shared."""
        made = Metric(self.rows, cols, self.gradients, inputs)
        object.__setattr__(made, "_of_rows", self._of_rows)
        object.__setattr__(made, "_row_triangles", self._row_triangles)
        return made

    @property
    def is_plain(self) -> bool:
        """Whether this is the unweighted error."""
        return self.gradients is None and self.inputs is None

    @property
    def mean(self) -> Float[Tensor, " cols"] | None:
        """What the inputs are centred by; None where they are not."""
        return None if self.inputs is None or not self.inputs.centred else self.inputs.mean

    @cached_property
    def shrinkage(self) -> tuple[float, float]:
        """How much of X^T X is kept in the input's second moment A, and the identity added; see `shrinkage_of`."""
        if self.inputs is None:
            return 0.0, 1.0
        n, p = self.inputs.count, self.cols
        trace = self.inputs.trace / n
        if trace <= 0.0:
            return 0.0, 1.0
        amount = shrinkage_of(n, p, trace, self.inputs.square / n**2)
        return (1 - amount) / n, max(amount, _FLOOR) * trace / p

    @cached_property
    def _weighing(self) -> Tensor | None:
        """The gradients; None where they are all zero and tell nothing apart."""
        return self.gradients if self.gradients is not None and self.gradients.any() else None

    @property
    def row_root(self) -> RowRoot:
        """G^(1/2), exact or by modes."""
        if () not in self._of_rows:
            self._of_rows[()] = RowRoot.of(self._weighing, self.rows)
        found: RowRoot = self._of_rows[()]
        return found

    def output_gram(self, matrix: Blocks) -> Float[Tensor, "rows rows"]:
        """G^(1/2) W A W^T G^(1/2), in float64."""
        keep, ridge = self.shrinkage
        gram = ridge * matrix.gram()
        if self.inputs is not None and keep > 0:
            gram = gram + keep * self.inputs.output_gram(matrix)
        return self.row_root.apply(self.row_root.apply(gram).T)

    def squared(self, chunks: Iterable[tuple[slice, Tensor]]) -> float:
        """The squared error that a difference makes, given as columns in float64 and which they are."""
        keep, ridge = self.shrinkage
        plain = 0.0

        def scaled() -> Iterator[tuple[slice, Tensor]]:
            nonlocal plain
            for where, chunk in chunks:
                weighed = self.row_root.apply(chunk)
                plain += float(weighed.square().sum())
                yield where, weighed

        if self.inputs is not None and keep > 0:
            total = keep * self.inputs.squared(scaled())
        else:
            total = 0.0 * sum(1 for _ in scaled())
        return total + ridge * plain

    def through(self, factor: Float[Tensor, "cols r"]) -> Float[Tensor, "cols r"]:
        """A C, in the factor's precision; C itself where A is the identity."""
        keep, ridge = self.shrinkage
        if self.inputs is None and ridge == 1.0:
            return factor
        product = ridge * factor
        return product if self.inputs is None or keep == 0 else product + keep * self.inputs.through(factor)

    @cached_property
    def input_moment(self) -> Float[Tensor, "cols cols"]:
        """A, in float64; for columns that are not too many."""
        keep, ridge = self.shrinkage
        identity = torch.eye(self.cols, dtype=torch.float64)
        return ridge * identity if self.inputs is None or keep == 0 else keep * self.inputs.whole + ridge * identity

    @cached_property
    def seen_inputs(self) -> Float[Tensor, "n cols"] | None:
        """Y with Y^T Y = A but for its ridge, in float64: `SEEN` rows that stand for all; None: A is the identity."""
        keep, _ = self.shrinkage
        return None if self.inputs is None or keep == 0 else keep**0.5 * self.inputs.some(SEEN)

    def row_gram(self, factor: Float[Tensor, "rows r"]) -> Float[Tensor, "r r"]:
        """R^T G R, in the factor's precision."""
        scaled = self.row_root.to(factor.dtype).apply(factor)
        return scaled.T @ scaled

    def col_gram(self, factor: Float[Tensor, "cols r"]) -> Float[Tensor, "r r"]:
        """C^T A C, in the factor's precision; through float32 where the inputs are many."""
        return _ColGram.apply(factor, self)

    def row_factors(self, modes: Sequence[int]) -> list[Tensor] | None:
        """Square roots of the row metric, one for each mode (Kronecker); None if it is the identity."""
        if self._weighing is None:
            return None
        key = tuple(modes)
        if key not in self._of_rows:
            self._of_rows[key] = self._row_factors(self._weighing, modes)
        return list(self._of_rows[key])

    def _row_factors(self, gradients: Tensor, modes: Sequence[int]) -> list[Tensor]:
        pad = prod(modes) - self.rows
        g = gradients.double()
        mean = float(g.sum() if g.ndim == 1 else g.trace()) / self.rows
        d = len(modes)
        letters = "abcdefghijklm"[:d]
        moments = []
        if g.ndim == 1:
            padded = F.pad(g, (0, pad)).reshape(*modes)
            for k in range(d):
                moments.append(torch.diag(padded.movedim(k, 0).reshape(modes[k], -1).sum(1)))
        else:
            padded = F.pad(g, (0, pad, 0, pad)).reshape(*modes, *modes)
            for k in range(d):
                other = letters[:k] + "z" + letters[k + 1 :]
                moments.append(torch.einsum(f"{letters}{other}->{letters[k]}z", padded))
        return _scaled([_normal_root(moment) for moment in moments], mean)

    def col_factors(self, modes: Sequence[int]) -> list[Tensor] | None:
        """Square roots of the column metric, one for each mode (Kronecker); None if it is the identity."""
        if self.inputs is None:
            return None
        keep, ridge = self.shrinkage
        mean = keep * self.inputs.trace / self.cols + ridge
        roots = [self._mode_root(prod(modes[:k]), mode, prod(modes[k + 1 :])) for k, mode in enumerate(modes)]
        return _scaled(roots, mean)

    def row_triangles(self, modes: Sequence[int]) -> list[Triangle]:
        """The row metric's factors, one for each mode, exact where it is one; none where it is plain, or no matrix."""
        if tuple(modes) not in self._row_triangles:
            alone = self.row_root.moment if len(modes) == 1 else None
            self._row_triangles[tuple(modes)] = _triangles(alone, self.row_factors(modes) if len(modes) > 1 else None)
        return self._row_triangles[tuple(modes)]

    def col_triangles(self, modes: Sequence[int]) -> list[Triangle]:
        """The column metric's factors alike; none where columns are too many for a moment, or it is plain."""
        if tuple(modes) not in self._col_triangles:
            formed = len(modes) == 1 and self.inputs is not None and self.cols <= EXACT_LIMIT
            alone, several = self.input_moment if formed else None, self.col_factors(modes) if len(modes) > 1 else None
            self._col_triangles[tuple(modes)] = _triangles(alone, several)
        return self._col_triangles[tuple(modes)]

    def _mode_root(self, before: int, mode: int, after: int) -> Tensor:
        """The root of the moment along one mode of the folded inputs; shared by all foldings that have this mode."""
        key = before, mode, after
        if key not in self._roots:
            if self.inputs is None:
                raise RuntimeError("Only inputs that were seen have a moment.")
            keep, ridge = self.shrinkage
            moment = keep * self.inputs.mode_moment(*key)
            self._roots[key] = _normal_root(moment + ridge * (self.cols / mode) * _identity(moment))
        return self._roots[key]


class _ColGram(torch.autograd.Function):
    """C^T A C with one product by A for the value and the gradient: A is symmetric."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, metric: Metric) -> Tensor:
        through = metric.through(factor)
        ctx.save_for_backward(through)
        return factor.T @ through

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (through,) = ctx.saved_tensors
        return through @ (gradients[0] + gradients[0].T), None


@dataclass(frozen=True, eq=False)
class Triangle:
    """L with L L^T = M of a mode's moment.

    Attributes:
        transposed: L^T, upper triangular: what takes a vector into the metric.
        inverse: of that.
    """

    transposed: Float[Tensor, "n n"]
    inverse: Float[Tensor, "n n"]

    @classmethod
    def of(cls, moment: Float[Tensor, "n n"]) -> Triangle:
        """That of a moment, which a floor holds invertible."""
        upper = torch.linalg.cholesky(moment).T
        return cls(upper, torch.linalg.solve_triangular(upper, _identity(upper), upper=True))


def _triangles(alone: Tensor | None, roots: Sequence[Tensor] | None) -> list[Triangle]:
    """Those of one mode's moment, or of several modes' symmetric roots."""
    moments = [root @ root for root in roots or ()] if alone is None else [alone]
    return [Triangle.of(moment) for moment in moments]


@dataclass(frozen=True, eq=False)
class RowRoot:
    """A symmetric square root of the row metric: a matrix, a diagonal (rows,), or None for the identity."""

    root: Tensor | None

    @classmethod
    def of(cls, gradients: Tensor | None, rows: int) -> RowRoot:
        if gradients is None:
            return cls(None)
        moment = gradients.double()
        if moment.ndim == 1:
            return cls((moment + _FLOOR * float(moment.mean())).sqrt())
        ridge = _FLOOR * float(moment.trace()) / rows
        return cls(_root(moment + ridge * _identity(moment)))

    def to(self, dtype: torch.dtype) -> RowRoot:
        """The same in another precision."""
        if self.root is None or self.root.dtype == dtype:
            return self
        return self._single if dtype is torch.float32 else RowRoot(self.root.to(dtype))

    @cached_property
    def _single(self) -> RowRoot:
        return RowRoot(None if self.root is None else self.root.float())

    def apply(self, matrix: Tensor) -> Tensor:
        """G^(1/2) times a matrix."""
        if self.root is None:
            return matrix
        return self.root[:, None] * matrix if self.root.ndim == 1 else self.root @ matrix

    @cached_property
    def moment(self) -> Tensor | None:
        """G, where it is a matrix."""
        return None if self.root is None or self.root.ndim == 1 else self.root @ self.root

    def weigh(self, matrix: Tensor) -> Tensor:
        """G times a matrix."""
        return self.apply(self.apply(matrix)) if self.moment is None else self.moment @ matrix

    def remove(self, matrix: Tensor) -> Tensor:
        """G^(-1/2) times a matrix."""
        if self.root is None:
            return matrix
        return matrix / self.root[:, None] if self.root.ndim == 1 else torch.linalg.solve(self.root, matrix)


def _normal_root(moment: Tensor) -> Tensor:
    """A square root of a mode's moment, invertible and of mean eigenvalue one."""
    size = float(moment.trace()) / len(moment)
    return _identity(moment) if size <= 0.0 else _root(moment / size + 1e-4 * _identity(moment))


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _scaled(roots: list[Tensor], mean: float) -> list[Tensor]:
    """Modes' roots whose Kronecker product has the mean eigenvalue `mean`."""
    return [roots[0] * mean**0.5, *roots[1:]]


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    floor = float(values[-1].clamp_min(0)) * 1e-12
    return (vectors * values.clamp_min(floor).sqrt()) @ vectors.T

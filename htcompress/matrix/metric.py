"""The metric of a matrix's error: what enters the matrix, and what its output does to the model's.

The squared error of W' is E ||G^(1/2) (W - W') x||^2 with x the input of the matrix and G the second moment
of the gradient at its output. Without data both are identities, and the error is the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from htcompress.errors import ShapeError

EXACT_LIMIT = 2048
"""The largest number of rows whose second moment is formed; beyond it, its diagonal."""

_FLOOR = 1e-6
_DOUBLED = 1 << 22
_PROBES = 128
_MODE_NUMBERS = 1 << 21


@dataclass(frozen=True, eq=False)
class Metric:
    """The metric of a `rows` x `cols` matrix; the identity where a part is None.

    Args:
        gradients: second moment of the gradients at the matrix's output: (rows, rows), or (rows,), its
            diagonal, where the matrix has more than `EXACT_LIMIT` rows.
        inputs: (samples, cols) of what enters the matrix; centred where the bias takes up the mean error.
        mean: (cols,) what the inputs were centred by; None where they were not.
        samples: how many samples the inputs stand for, where they were condensed; None: one for each row.
    """

    rows: int
    cols: int
    gradients: Tensor | None = None
    inputs: Float[Tensor, "samples cols"] | None = None
    mean: Float[Tensor, " cols"] | None = None
    samples: int | None = None
    _moments: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.gradients is not None and self.gradients.shape not in ((self.rows,) * 2, (self.rows,)):
            raise ShapeError(f"Gradients of a matrix of {self.rows} rows; found {tuple(self.gradients.shape)}.")
        if self.inputs is not None and self.inputs.shape[1] != self.cols:
            raise ShapeError(f"Inputs of a matrix of {self.cols} columns; found {tuple(self.inputs.shape)}.")

    def condensed(self) -> Metric:
        """The same metric from at most `cols` inputs that have the same second moment; cheaper to work with."""
        if self.inputs is None or len(self.inputs) <= self.cols:
            return self
        # The columns' second moment is smaller than the samples: any square root of it serves.
        values, vectors = torch.linalg.eigh((self.inputs.T @ self.inputs).double())
        scale = (self.cols / len(self.inputs)) ** 0.5
        root = scale * values.clamp_min(0).sqrt()[:, None] * vectors.T
        return replace(self, inputs=root.float(), samples=len(self.inputs))

    @property
    def is_plain(self) -> bool:
        """Whether this is the unweighted error."""
        return self.gradients is None and self.inputs is None

    @cached_property
    def shrinkage(self) -> tuple[float, float]:
        """How much of the input's second moment is kept, and the identity added to it.

        Oracle approximating shrinkage (Chen et al. 2010) from the number of samples, by traces only.
        """
        if self.inputs is None:
            return 0.0, 1.0
        n, p = self.inputs.shape
        trace = float(self.inputs.square().sum(dtype=torch.float64)) / n
        if trace == 0.0:
            return 0.0, 1.0
        # ||A||_F^2 = E ||A z||^2 over random signs z (Hutchinson): A itself may be too large to form.
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (p, _PROBES), generator=generator).to(self.inputs) * 2 - 1
        square = float((self.inputs.T @ (self.inputs @ signs)).square().sum(dtype=torch.float64)) / n**2 / _PROBES
        above = (1 - 2 / p) * square + trace**2
        n = self.samples or n
        below = (n + 1 - 2 / p) * (square - trace**2 / p)
        amount = 1.0 if below <= 0 else min(1.0, above / below)
        return 1 - amount, max(amount, _FLOOR) * trace / p

    @cached_property
    def _weighing(self) -> Tensor | None:
        """The gradients; None where they are all zero and tell nothing apart."""
        return self.gradients if self.gradients is not None and self.gradients.any() else None

    @cached_property
    def row_root(self) -> RowRoot:
        """G^(1/2), exact or by modes."""
        return RowRoot.of(self._weighing, self.rows)

    def output_gram(self, matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows rows"]:
        """G^(1/2) W A W^T G^(1/2), in float64."""
        scaled = self.row_root.apply(matrix.double())
        keep, ridge = self.shrinkage
        gram = ridge * (scaled @ scaled.T)
        if self.inputs is not None and keep > 0:
            out = scaled @ self.inputs.double().T
            gram += keep / len(self.inputs) * (out @ out.T)
        return gram

    def output_factor(self, matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows k"]:
        """F with F F^T = `output_gram`, for matrices of too many rows for a Gram matrix."""
        scaled = self.row_root.apply(matrix.double())
        keep, ridge = self.shrinkage
        parts = [ridge**0.5 * scaled]
        if self.inputs is not None and keep > 0:
            parts.append((keep / len(self.inputs)) ** 0.5 * (scaled @ self.inputs.double().T))
        return torch.cat(parts, dim=1)

    def squared(self, matrix: Float[Tensor, "rows cols"]) -> float:
        """The squared error that a difference of this size makes."""
        scaled = self.row_root.apply(matrix.double())
        keep, ridge = self.shrinkage
        total = ridge * float(scaled.square().sum())
        if self.inputs is not None and keep > 0:
            total += keep / len(self.inputs) * float((scaled @ self.inputs.double().T).square().sum())
        return total

    def weigh(self, matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """G W A, half the gradient of the squared error; in float32 where the matrix is large."""
        matrix = matrix.double() if matrix.numel() <= _DOUBLED else matrix.float()
        root = self.row_root if matrix.dtype == torch.float64 else self.row_root.float()
        keep, ridge = self.shrinkage
        total = ridge * root.apply(root.apply(matrix))
        if self.inputs is not None and keep > 0:
            inputs = self._precise_inputs.to(matrix.dtype)
            total += root.apply(root.apply(keep / len(inputs) * (matrix @ inputs.T))) @ inputs
        return total

    @cached_property
    def _precise_inputs(self) -> Tensor:
        assert self.inputs is not None
        return self.inputs.double() if self.inputs.numel() <= _DOUBLED else self.inputs

    def row_gram(self, factor: Float[Tensor, "rows r"]) -> Float[Tensor, "r r"]:
        """R^T G R, in the factor's precision."""
        scaled = self.row_root.apply(factor)
        return scaled.T @ scaled

    def col_gram(self, factor: Float[Tensor, "cols r"]) -> Float[Tensor, "r r"]:
        """C^T A C; in float32 where the inputs are many."""
        keep, ridge = self.shrinkage
        gram = ridge * (factor.T @ factor)
        if self.inputs is not None and keep > 0:
            inputs = self._precise_inputs
            seen = (inputs @ factor.to(inputs.dtype)).to(factor.dtype)
            gram = gram + keep / len(self.inputs) * (seen.T @ seen)
        return gram

    def row_factors(self, modes: Sequence[int]) -> list[Tensor] | None:
        """Square roots of the row metric, one for each mode (Kronecker); None if it is the identity."""
        if self._weighing is None:
            return None
        pad = prod(modes) - self.rows
        g = self._weighing.double()
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
        return _kronecker_roots(moments, mean)

    def col_factors(self, modes: Sequence[int]) -> list[Tensor] | None:
        """Square roots of the column metric, one for each mode (Kronecker); None if it is the identity."""
        if self.inputs is None:
            return None
        keep, ridge = self.shrinkage
        moments = []
        for k, mode in enumerate(modes):
            before, after = prod(modes[:k]), prod(modes[k + 1 :])
            moment = keep * self._mode_moment(before, mode, after)
            moments.append(moment + ridge * (self.cols / mode) * torch.eye(mode, dtype=torch.float64))
        mean = keep * float(self.inputs.square().sum(dtype=torch.float64)) / self.inputs.numel() + ridge
        return _kronecker_roots(moments, mean)

    def _mode_moment(self, before: int, mode: int, after: int) -> Tensor:
        """The second moment along one mode of the folded inputs; shared by all foldings that have this mode."""
        key = before, mode, after
        if key not in self._moments:
            assert self.inputs is not None
            # Each sample holds cols / mode vectors of this mode: a part of the samples is plenty.
            enough = len(self.inputs) if self.samples is not None else max(1, _MODE_NUMBERS // self.cols)
            count = min(len(self.inputs), enough)
            padded = F.pad(self.inputs[:count], (0, before * mode * after - self.cols))
            vectors = padded.reshape(count * before, mode, after).movedim(1, 0).reshape(mode, -1)
            self._moments[key] = (vectors @ vectors.T).double() / count
        return self._moments[key]


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
        return cls(_root(moment + ridge * torch.eye(rows, dtype=torch.float64)))

    def float(self) -> RowRoot:
        """The same in float32."""
        return RowRoot(None if self.root is None else self.root.float())

    def apply(self, matrix: Tensor) -> Tensor:
        """G^(1/2) times a matrix."""
        if self.root is None:
            return matrix
        return self.root[:, None] * matrix if self.root.ndim == 1 else self.root @ matrix

    def remove(self, matrix: Tensor) -> Tensor:
        """G^(-1/2) times a matrix."""
        if self.root is None:
            return matrix
        return matrix / self.root[:, None] if self.root.ndim == 1 else torch.linalg.solve(self.root, matrix)


def _kronecker_roots(moments: list[Tensor], mean: float) -> list[Tensor]:
    """Square roots whose Kronecker product has the mean eigenvalue `mean`; each floored to be invertible."""
    roots = []
    for moment in moments:
        size = float(moment.trace()) / len(moment)
        if size == 0.0:
            roots.append(torch.eye(len(moment), dtype=torch.float64))
            continue
        ridge = 1e-4 * torch.eye(len(moment), dtype=torch.float64)
        roots.append(_root(moment / size + ridge))
    roots[0] = roots[0] * mean**0.5
    return roots


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    floor = float(values[-1].clamp_min(0)) * 1e-12
    return (vectors * values.clamp_min(floor).sqrt()) @ vectors.T

"""What torch's kernels take of the weights of one layer and direction."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from htcompress.matrix.blocks import thin_product
from htcompress.matrix.stored import StoredMatrix

_MANY = 16
"""Vectors from which on a CPU reduces them faster the other way round."""


@dataclass(frozen=True)
class KernelWeights:
    """What torch's native kernels take for one layer and direction.

    `reduce` (r, input), or a matrix to contract with, turns the input into the features that `ih` (rows, r) reads;
    None: `ih` reads the input itself. Without `ih` the features are W_ih x. The recurrent matrix is given whole,
    (rows, state), or as factors R (rows, r) and C (state, r).
    """

    reduce: Tensor | StoredMatrix | None
    ih: Tensor | None
    recurrent: Tensor | tuple[Tensor, Tensor]
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None
    rows_at: Tensor | None = None
    """Where the rows of a matrix to contract with stand, in the units' own order; None: as they are."""
    scales: Tensor | None = None
    """What a matrix to contract with reads each input times; None: as it is."""

    def features(self, x: Float[Tensor, "*vectors inputs"]) -> Float[Tensor, "*vectors features"]:
        """What `ih` reads of the input."""
        if self.reduce is None:
            return x
        if not isinstance(self.reduce, Tensor):
            if self.reduce.network is None:
                raise RuntimeError("What is contracted with has a network of cores.")
            read = x if self.scales is None else (x * self.scales).to(x.dtype)
            rows = self.reduce.network.times(self.reduce.operands(), read)
            return rows if self.rows_at is None else rows.index_select(-1, self.rows_at)
        vectors = x.numel() // max(1, x.shape[-1])
        if x.device.type != "cpu" or not isinstance(vectors, int) or vectors < _MANY:
            return F.linear(x, self.reduce)
        flat = x.reshape(-1, x.shape[-1])
        return thin_product(flat, self.reduce.T).reshape(*x.shape[:-1], -1)

    def apart(self) -> KernelWeights:
        """The same in memory of its own; a matrix to contract with stays what it is, its cores."""

        def own(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(own, value))
            return value.detach().clone() if isinstance(value, Tensor) else value

        return KernelWeights(**{field.name: own(getattr(self, field.name)) for field in fields(self)})

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """R and C; None where the recurrent matrix is given whole."""
        return self.recurrent if isinstance(self.recurrent, tuple) else None

    @cached_property
    def hh(self) -> Tensor:
        """The recurrent matrix, written out once."""
        if isinstance(self.recurrent, tuple):
            rows, cols = self.recurrent
            return rows @ cols.T
        return self.recurrent

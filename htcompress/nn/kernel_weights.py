"""What torch's kernels, and the steps in C, take of the weights of one layer and direction."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from htcompress.matrix.blocks import thin_product
from htcompress.matrix.stored import StoredMatrix
from htcompress.nn.program import is_thin, usable
from htcompress.nn.program import thin_product as thin_product_in_c
from htcompress.side_by_side import cached_property

TILED = 1 << 18
"""Numbers of a whole recurrent matrix up to which it is put into tiles; a larger one is bound by memory either way."""

_MANY = 16
"""Vectors from which on a CPU reduces them faster the other way round."""


@dataclass(frozen=True)
class Tiled:
    """The recurrent matrix of a layer and direction in tiles, as the steps in C read it; None where there is no factor.

    Attributes:
        rank: of the factors; 0: the matrix is whole.
        columns: the columns' factor, (state, rank padded).
        matrix: the rows' factor or the whole, (rank or state, rows padded).
        bias: what is added to W_ih x, (rows,).
        hidden_bias: (rows padded,), of the hidden part alone.
    """

    rank: int
    columns: Tensor | None
    matrix: Tensor
    bias: Tensor | None
    hidden_bias: Tensor | None

    @classmethod
    def of(cls, weights: KernelWeights, tile: int, *, keeps_candidate_bias: bool) -> Tiled:
        """Of the weights that torch's kernels take, in tiles of so many columns."""
        rows, cols = weights.factors or (weights.hh, None)
        bias, hidden = weights.bias_ih, weights.bias_hh
        if not keeps_candidate_bias and bias is not None and hidden is not None:
            bias, hidden = bias + hidden, None
        return cls(
            0 if cols is None else cols.shape[1],
            None if cols is None else _tiles(cols, tile),
            _tiles(rows.T, tile),
            bias,
            None if hidden is None else F.pad(hidden, (0, -len(hidden) % tile)),
        )


def _tiles(matrix: Tensor, tile: int) -> Tensor:
    """(inner, outer) as all rows of the first `tile` columns, then those of the next."""
    padded = F.pad(matrix, (0, -matrix.shape[1] % tile))
    return padded.reshape(len(padded), -1, tile).transpose(0, 1).contiguous()


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
    settled: bool = True
    """Whether they are made anew where the numbers of the recurrent matrix change, so that a copy of it may be kept."""

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
        if usable(x, self.reduce) and is_thin(flat := x.reshape(-1, x.shape[-1]), self.reduce.T):
            return thin_product_in_c(flat, self.reduce.T).reshape(*x.shape[:-1], -1)
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

    @property
    def shape(self) -> tuple[int, int]:
        """Of the recurrent matrix."""
        if isinstance(self.recurrent, tuple):
            return self.recurrent[0].shape[0], self.recurrent[1].shape[0]
        return self.recurrent.shape[0], self.recurrent.shape[1]

    def tiled(self, tile: int, *, keeps_candidate_bias: bool) -> Tiled:
        """The same for the steps in C, made once; see `Tiled`."""
        if "_tiled" not in vars(self):
            vars(self)["_tiled"] = Tiled.of(self, tile, keeps_candidate_bias=keeps_candidate_bias)
        found: Tiled = vars(self)["_tiled"]
        return found

    @cached_property
    def hh(self) -> Tensor:
        """The recurrent matrix, written out once."""
        if isinstance(self.recurrent, tuple):
            rows, cols = self.recurrent
            return rows @ cols.T
        return self.recurrent

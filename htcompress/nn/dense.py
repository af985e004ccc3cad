"""The dense weights of one layer and direction, as torch stores them, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from htcompress.forms import DenseMatrix
from htcompress.nn.gates import GateMatrices, merge_biases
from htcompress.nn.settings import RecurrentSettings


@dataclass(frozen=True, eq=False)
class DenseDirection:
    """The weights of one layer and direction; the biases merged as far as the function allows.

    `bias_hn` is the part of a GRU's hidden bias that the reset gate keeps apart.
    """

    settings: RecurrentSettings
    layer: int
    ih: Float[Tensor, "rows inputs"]
    hh: Float[Tensor, "rows state"]
    bias: Float[Tensor, " rows"] | None
    bias_hn: Float[Tensor, " hidden"] | None
    hr: Float[Tensor, "proj hidden"] | None

    @classmethod
    def read(cls, settings: RecurrentSettings, layer: int, suffix: str, get: Callable[[str], Tensor]) -> DenseDirection:
        """Take a direction's tensors by torch's names (`weight_ih_l0`, ...), in float32 or float64, where they are."""

        def tensor(name: str) -> Tensor:
            value = get(name + suffix).detach()
            return value if value.dtype == torch.float64 else value.float()

        bias, bias_hn = None, None
        if settings.bias:
            bias, bias_hn = merge_biases(settings, tensor("bias_ih"), tensor("bias_hh"))
        hr = tensor("weight_hr") if settings.proj_size else None
        return cls(settings, layer, tensor("weight_ih"), tensor("weight_hh"), bias, bias_hn, hr)

    @classmethod
    def read_all(cls, settings: RecurrentSettings, tensors: Mapping[str, Tensor]) -> list[DenseDirection]:
        """All directions of a layer from its own state_dict."""
        return [cls.read(settings, layer, suffix, tensors.__getitem__) for layer, _, suffix in settings.directions()]

    @property
    def biases(self) -> int:
        """The numbers in the merged biases."""
        return sum(b.numel() for b in (self.bias, self.bias_hn) if b is not None)

    @property
    def parameters(self) -> int:
        """The numbers of the direction kept dense, biases merged."""
        return self.ih.numel() + self.hh.numel() + self.biases + (0 if self.hr is None else self.hr.numel())

    def bias_columns(self) -> Float[Tensor, "rows k"]:
        """The biases as columns beside [W_ih | W_hh]: none, one, or a GRU's two."""
        columns = [] if self.bias is None else [self.bias]
        if self.bias_hn is not None:
            columns.append(
                torch.cat([self.bias_hn.new_zeros(self.settings.rows - self.settings.hidden_size), self.bias_hn])
            )
        return torch.stack(columns, dim=1) if columns else self.ih.new_zeros(len(self.ih), 0)

    def on_cpu(self) -> DenseDirection:
        """The direction in the CPU's memory."""
        bias, bias_hn, hr = (None if t is None else t.cpu() for t in (self.bias, self.bias_hn, self.hr))
        return replace(self, ih=self.ih.cpu(), hh=self.hh.cpu(), bias=bias, bias_hn=bias_hn, hr=hr)

    def arranged(self, order: Int[Tensor, " hidden"], *, all_but_ih: bool = False) -> DenseDirection:
        """The direction with its hidden units in another order: rows of every gate, columns that read units.

        `all_but_ih`: W_ih, which may be large, stays as it is.
        """
        rows = torch.cat([order + gate * self.settings.hidden_size for gate in range(self.settings.gates)])
        hh, hr = self.hh[rows], self.hr
        if hr is None:
            hh = hh[:, order]
        else:
            # It is the projection that reads the units; what it puts out is in no order of theirs.
            hr = hr[:, order]
        bias, bias_hn = (None if b is None else b[at] for b, at in ((self.bias, rows), (self.bias_hn, order)))
        return replace(self, ih=self.ih if all_but_ih else self.ih[rows], hh=hh, bias=bias, bias_hn=bias_hn, hr=hr)

    def joint(self, *, with_biases: bool) -> Float[Tensor, "rows columns"]:
        """[W_ih | W_hh], and the bias columns where asked for."""
        parts = [self.ih, self.hh]
        return torch.cat([*parts, self.bias_columns()] if with_biases else parts, dim=1)

    def matrices(self) -> GateMatrices:
        """The direction kept dense."""
        hr = None if self.hr is None else DenseMatrix(self.hr)
        return GateMatrices(DenseMatrix(self.ih), DenseMatrix(self.hh), bias=self.bias, bias_hn=self.bias_hn, hr=hr)


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A recurrent layer of a model.

    Attributes:
        directions: its weights by direction (`l0`, `l0_reverse`, ...), on the CPU, in float32 or float64.
        dtype: what the model has them in.
    """

    name: str
    settings: RecurrentSettings
    directions: dict[str, DenseDirection]
    dtype: torch.dtype = torch.float32

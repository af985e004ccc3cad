"""The weights of one layer and direction, factored or dense, as parameters that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from htcompress.formats import NetworkMatrix, Structure
from htcompress.matrix import HTMatrix, Layout
from htcompress.matrix.blocks import thin_product
from htcompress.matrix.factored import Factored
from htcompress.nn.plan import Plan, admitted, plan_for
from htcompress.nn.settings import Kind, RecurrentSettings
from htcompress.tensor import HTTensor


class DenseWeight(nn.Module):
    """A matrix kept as it is; a copy of it unless `shared`."""

    def __init__(self, matrix: Float[Tensor, "rows cols"], *, shared: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix.detach() if shared else matrix.detach().clone())

    def dense(self) -> Float[Tensor, "rows cols"]:
        return self.weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def to_config(self) -> dict[str, Any]:
        return {"form": "dense", "shape": list(self.shape)}


class FactoredWeight(nn.Module):
    """A matrix stored as cores, which are its parameters."""

    def __init__(self, matrix: Factored, names: Sequence[str]) -> None:
        super().__init__()
        self.layout = matrix.layout
        self.network = matrix.network
        self.rank = matrix.rank if matrix.is_split else None
        self.plan = Plan.AUTO
        self._names = [None if core is None else name for name, core in zip(names, matrix.cores, strict=True)]
        for name, core in zip(self._names, matrix.cores, strict=True):
            if name is not None and core is not None:
                self.register_parameter(name, nn.Parameter(core.detach().clone().contiguous()))

    def matrix(self) -> Factored:
        """The pure object over the live parameters."""
        raise NotImplementedError

    def dense(self) -> Float[Tensor, "rows cols"]:
        return self.matrix().dense()

    def factors(self) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "cols r"]]:
        """R and C with W = R C^T; split layouts only."""
        matrix = self.matrix()
        assert isinstance(matrix, HTMatrix)
        return matrix.factors()

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.rows, self.layout.cols

    @property
    def projects(self) -> bool:
        """Whether reducing the input to r numbers first costs less than the matrix itself."""
        rows, cols = self.shape
        return self.rank is not None and self.rank * (rows + cols) < rows * cols

    def use(self, plan: Plan | str) -> None:
        """Always follow one plan. Raises `RequestError` where the matrix does not admit it."""
        self.plan = admitted(self.network, self.rank, Plan(plan))

    def plan_at(self, vectors: int) -> Plan:
        """The plan for so many input vectors at a time, gradients recorded or not."""
        if self.plan is not Plan.AUTO:
            return self.plan
        return plan_for(self.network, self.rank, vectors, learning=torch.is_grad_enabled())

    def to_config(self) -> dict[str, Any]:
        """The structure as JSON values."""
        raise NotImplementedError

    def _stored(self) -> tuple[Tensor | None, ...]:
        return tuple(None if name is None else getattr(self, name) for name in self._names)


class HTWeight(FactoredWeight):
    """A matrix in HT form. Its parameters are the stored cores: `U<mode>` at leaves, `B<modes>` inside."""

    def __init__(self, matrix: HTMatrix) -> None:
        nodes = matrix.layout.tree.nodes
        super().__init__(matrix, [("U" if node.is_leaf else "B") + "_".join(map(str, node.leaves)) for node in nodes])
        self.ranks = matrix.tensor.ranks

    def matrix(self) -> HTMatrix:
        return HTMatrix(self.layout, HTTensor(self.layout.tree, self.layout.shape, self.ranks, self._stored()))

    def to_config(self) -> dict[str, Any]:
        return {"form": "ht", "layout": self.layout.to_config(), "ranks": list(self.ranks)}

    def extra_repr(self) -> str:
        rows, cols = self.shape
        return f"{rows} x {cols}, modes={self.layout.shape}, ranks={self.ranks}"


class NetworkWeight(FactoredWeight):
    """A matrix in one of the formats that HT is compared with."""

    def __init__(self, matrix: NetworkMatrix) -> None:
        super().__init__(matrix, matrix.structure.names)
        self.structure = matrix.structure

    def matrix(self) -> NetworkMatrix:
        return NetworkMatrix(self.structure, tuple(getattr(self, name) for name in self.structure.names))

    def to_config(self) -> dict[str, Any]:
        return self.structure.to_config()

    def extra_repr(self) -> str:
        rows, cols = self.shape
        return f"{self.structure.format}, {rows} x {cols}, modes={self.layout.shape}, ranks={self.structure.ranks}"


Weight = DenseWeight | FactoredWeight


def weight_from_config(config: dict[str, Any]) -> Weight:
    """A weight of the right structure, filled with zeros; the numbers come from a state_dict."""
    if config["form"] == "dense":
        return DenseWeight(torch.zeros(*config["shape"]))
    if config["form"] != "ht":
        return NetworkWeight(NetworkMatrix.zeros(Structure.from_config(config)))
    layout = Layout.from_config(config["layout"])
    return HTWeight(HTMatrix(layout, HTTensor.zeros(layout.tree, layout.shape, config["ranks"])))


def _factored(matrix: Factored) -> FactoredWeight:
    if isinstance(matrix, HTMatrix):
        return HTWeight(matrix)
    assert isinstance(matrix, NetworkMatrix)
    return NetworkWeight(matrix)


def make_weight(matrix: Factored | Tensor, *, shared: bool = False) -> Weight:
    """The module for a decomposed or a dense matrix."""
    return DenseWeight(matrix, shared=shared) if isinstance(matrix, Tensor) else _factored(matrix)


_MANY = 16
"""Vectors from which on a CPU reduces them faster the other way round."""


@dataclass(frozen=True)
class KernelWeights:
    """What torch's native kernels take for one layer and direction.

    `reduce` (r, input), or a matrix to contract with, turns the input into the features that `ih` (rows, r) reads;
    None: `ih` reads the input itself. Without `ih` the features are W_ih x. The recurrent matrix is given whole,
    (rows, state), or as factors R (rows, r) and C (state, r).
    """

    reduce: Tensor | Factored | None
    ih: Tensor | None
    recurrent: Tensor | tuple[Tensor, Tensor]
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None

    def features(self, x: Float[Tensor, "*vectors inputs"]) -> Float[Tensor, "*vectors features"]:
        """What `ih` reads of the input."""
        if self.reduce is None:
            return x
        if not isinstance(self.reduce, Tensor):
            return self.reduce.network.times(self.reduce.operands(), x)
        flat = x.reshape(-1, x.shape[-1])
        if x.device.type != "cpu" or len(flat) < _MANY:
            return F.linear(x, self.reduce)
        return thin_product(flat, self.reduce.T).reshape(*x.shape[:-1], -1)

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


@dataclass(frozen=True)
class GateMatrices:
    """The matrices of one layer and direction before they become parameters, each factored or dense.

    Either `joint`, one matrix for [W_ih | W_hh | biases], or `ih` and `hh`. `bias` (rows) is the merged
    bias where it is not a column of `joint`; `bias_hn` (hidden) is what a GRU cannot merge; `hr` is an
    LSTM's projection. Where they are `shared`, dense matrices become parameters without being copied.
    """

    ih: Factored | Tensor | None = None
    hh: Factored | Tensor | None = None
    joint: Factored | None = None
    bias: Tensor | None = None
    bias_hn: Tensor | None = None
    hr: Factored | Tensor | None = None
    shared: bool = False


class GateWeights(nn.Module):
    """The weights of one layer and direction: `GateMatrices` as parameters.

    `resolve` gives what a native kernel needs; where no gradient is recorded it is computed once and
    kept until a parameter changes.
    """

    ih: Weight | None
    hh: Weight | None
    joint: FactoredWeight | None
    hr: Weight | None
    bias: nn.Parameter | None
    bias_hn: nn.Parameter | None

    def __init__(self, settings: RecurrentSettings, layer: int, matrices: GateMatrices) -> None:
        super().__init__()
        self.settings = settings
        self.input_size = settings.layer_input(layer)
        self.ih = None if matrices.ih is None else make_weight(matrices.ih, shared=matrices.shared)
        self.hh = None if matrices.hh is None else make_weight(matrices.hh, shared=matrices.shared)
        self.joint = None if matrices.joint is None else _factored(matrices.joint)
        self.hr = None if matrices.hr is None else make_weight(matrices.hr, shared=matrices.shared)
        for name in ("bias", "bias_hn"):
            value = getattr(matrices, name)
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))
        self._kept: tuple[Any, KernelWeights] | None = None
        self._stores: list[dict[str, nn.Parameter | None]] = []

    def weights(self) -> dict[str, Weight]:
        """The matrices by name, in order."""
        named = {"joint": self.joint, "ih": self.ih, "hh": self.hh, "hr": self.hr}
        return {name: weight for name, weight in named.items() if weight is not None}

    def resolve(self, vectors: int = 1) -> KernelWeights:
        """The kernel's weights for the present parameters, and so many input vectors at a time."""
        plan = self._plan(vectors)
        if torch.is_grad_enabled():
            return self._resolve(plan)
        if not self._stores:
            self._stores = [module._parameters for module in self.modules()]
        try:
            parameters = [p for store in self._stores for p in store.values() if p is not None]
            key = plan, [(p.data_ptr(), p._version, p.dtype, p.device) for p in parameters]
        except RuntimeError:  # parameters made in inference mode carry no version
            return self._resolve(plan)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._resolve(plan)
        return self._kept[1]

    def written_out(self) -> KernelWeights:
        """The kernel's weights with the matrices written out, whatever the plan."""
        return self._resolve(Plan.MATERIALISE)

    def _plan(self, vectors: int) -> Plan:
        weight = self.ih if self.joint is None else self.joint
        if not isinstance(weight, FactoredWeight):
            return Plan.MATERIALISE
        plan = weight.plan_at(vectors)
        # The input is but a part of what a joint matrix reads.
        return Plan.MATERIALISE if plan is Plan.CONTRACT and weight is self.joint else plan

    def _resolve(self, plan: Plan) -> KernelWeights:
        hr = None if self.hr is None else self.hr.dense()
        if self.joint is not None:
            return self._resolve_joint(self.joint, plan, hr)
        assert self.ih is not None
        assert self.hh is not None
        bias_ih, bias_hh = self._biases(self.bias)
        recurrent = self.hh.factors() if isinstance(self.hh, FactoredWeight) and self.hh.projects else self.hh.dense()
        if isinstance(self.ih, FactoredWeight) and plan is Plan.PROJECT:
            rows, cols = self.ih.factors()
            return KernelWeights(cols.T, rows, recurrent, bias_ih, bias_hh, hr)
        if isinstance(self.ih, FactoredWeight) and plan is Plan.CONTRACT:
            return KernelWeights(self.ih.matrix(), None, recurrent, bias_ih, bias_hh, hr)
        return KernelWeights(None, self.ih.dense(), recurrent, bias_ih, bias_hh, hr)

    def _resolve_joint(self, joint: FactoredWeight, plan: Plan, hr: Tensor | None) -> KernelWeights:
        n, s = self.input_size, self.settings.state_size
        reduce = None
        recurrent: Tensor | tuple[Tensor, Tensor]
        if plan is Plan.PROJECT:
            rows, cols = joint.factors()
            reduce, ih, recurrent = cols[:n].T, rows, (rows, cols[n : n + s])
            columns = rows @ cols[n + s :].T
        else:
            dense = joint.dense()
            ih, recurrent, columns = dense[:, :n], dense[:, n : n + s], dense[:, n + s :]
        if columns.shape[1] == 0:
            bias_ih, bias_hh = self._biases(self.bias)
        elif columns.shape[1] == 1:
            bias_ih, bias_hh = self._biases(columns[:, 0])
        else:
            bias_ih, bias_hh = columns[:, 0], columns[:, 1]
        return KernelWeights(reduce, ih, recurrent, bias_ih, bias_hh, hr)

    def _biases(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if bias is None:
            return None, None
        if self.bias_hn is None:
            return bias, torch.zeros_like(bias)
        zeros = bias.new_zeros(2 * self.settings.hidden_size)
        return bias, torch.cat([zeros, self.bias_hn])

    def to_config(self) -> dict[str, Any]:
        """The structure as JSON values: forms, layouts, ranks, which biases there are."""
        biases = [name for name in ("bias", "bias_hn") if getattr(self, name) is not None]
        return {**{name: weight.to_config() for name, weight in self.weights().items()}, "biases": biases}

    @classmethod
    def from_config(cls, settings: RecurrentSettings, layer: int, config: dict[str, Any]) -> GateWeights:
        """Weights of this structure, zero; the inverse of `to_config`."""
        gates = cls(settings, layer, GateMatrices())
        for name in ("joint", "ih", "hh", "hr"):
            if name in config:
                setattr(gates, name, weight_from_config(config[name]))
        sizes = {"bias": settings.rows, "bias_hn": settings.hidden_size}
        for name in config["biases"]:
            gates.register_parameter(name, nn.Parameter(torch.zeros(sizes[name])))
        return gates

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_stores": []}


def merge_biases(
    settings: RecurrentSettings, bias_ih: Float[Tensor, " rows"], bias_hh: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " hidden"] | None]:
    """One bias where the function allows it. A GRU's reset gate keeps the hidden candidate's own apart."""
    if settings.kind is not Kind.GRU:
        return bias_ih + bias_hh, None
    keep = 2 * settings.hidden_size
    return torch.cat([bias_ih[:keep] + bias_hh[:keep], bias_ih[keep:]]), bias_hh[keep:].clone()

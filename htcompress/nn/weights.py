"""One matrix, factored or dense, as parameters that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from htcompress.formats import NetworkMatrix, Structure
from htcompress.matrix import HTMatrix, Layout, LayoutKind
from htcompress.matrix.factored import Factored
from htcompress.nn.plan import Plan, admitted, plan_for
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
    def is_plain(self) -> bool:
        """Whether the factors are parameters as they stand: a truncated SVD, nothing else stored."""
        return False

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

    def plan_at(self, vectors: Any) -> Plan:
        """The plan for so many input vectors at a time, gradients recorded or not."""
        if self.plan is not Plan.AUTO:
            return self.plan
        if torch.compiler.is_compiling() or not isinstance(vectors, int):
            # A graph is made once for all sizes, and by rules that a compiler follows.
            return Plan.PROJECT if self.projects else Plan.MATERIALISE
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

    @property
    def is_plain(self) -> bool:
        return self.layout.kind is LayoutKind.SVD and self._names[-1] is None and None not in self._names[:-1]

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
        return DenseWeight(torch.zeros(*config["shape"], dtype=torch.float32, device="cpu"))
    if config["form"] != "ht":
        return NetworkWeight(NetworkMatrix.zeros(Structure.from_config(config)))
    layout = Layout.from_config(config["layout"])
    return HTWeight(HTMatrix(layout, HTTensor.zeros(layout.tree, layout.shape, config["ranks"])))


def factored_weight(matrix: Factored) -> FactoredWeight:
    if isinstance(matrix, HTMatrix):
        return HTWeight(matrix)
    assert isinstance(matrix, NetworkMatrix)
    return NetworkWeight(matrix)


def make_weight(matrix: Factored | Tensor, *, shared: bool = False) -> Weight:
    """The module for a decomposed or a dense matrix."""
    return DenseWeight(matrix, shared=shared) if isinstance(matrix, Tensor) else factored_weight(matrix)

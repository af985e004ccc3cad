"""One matrix in whatever form, as parameters that train."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from htcompress.forms import zeros
from htcompress.matrix.stored import StoredMatrix
from htcompress.nn.execution import Execution, admitted, execution_for


class Weight(nn.Module):
    """A matrix stored as cores, which are its parameters, by the names that its form has for them.

    Args:
        matrix: in any form.
        shared: whether the cores become parameters without being copied.
    """

    def __init__(self, matrix: StoredMatrix, *, shared: bool = False) -> None:
        super().__init__()
        self.network = matrix.network
        self.rank = matrix.rank
        self.is_dense = matrix.is_dense
        self.stores_factors = matrix.stores_factors
        self.execution = Execution.AUTO
        self._names = tuple(matrix.core_names)
        # The structure without its numbers: those are the parameters.
        self._structure = matrix.with_cores(
            [core.detach().to("meta") if isinstance(core, Tensor) else core for core in matrix.cores]
        )
        for name, core in zip(self._names, matrix.cores, strict=True):
            if isinstance(core, Tensor):
                own = core.detach()
                self.register_parameter(name, nn.Parameter(own if shared else own.clone().contiguous()))

    def matrix(self) -> StoredMatrix:
        """The pure object over the live parameters."""
        structure = self._structure
        named = zip(self._names, structure.cores, strict=True)
        return structure.with_cores([getattr(self, name) if isinstance(core, Tensor) else core for name, core in named])

    def dense(self) -> Float[Tensor, "rows cols"]:
        return self.matrix().dense()

    def factors(self) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "cols r"]]:
        """R and C with W = R C^T. Raises `ValueError` where the form is no such product."""
        factors = self.matrix().factors()
        if factors is None:
            raise ValueError("Only a split layout has row and column factors.")
        return factors

    @property
    def shape(self) -> tuple[int, int]:
        return self._structure.shape

    @property
    def projects(self) -> bool:
        """Whether reducing the input to r numbers first costs less than the matrix itself."""
        rows, cols = self.shape
        return self.rank is not None and self.rank * (rows + cols) < rows * cols

    def use(self, execution: Execution | str) -> None:
        """Always read the input in one way. Raises `RequestError` where the matrix does not admit it."""
        if self.network is not None:
            self.execution = admitted(self.network, self.rank, Execution(execution))

    def execution_at(self, vectors: Any) -> Execution:
        """How so many input vectors at a time are read, gradients recorded or not."""
        if self.network is None:
            return Execution.MATERIALISE
        if self.execution is not Execution.AUTO:
            return self.execution
        if torch.compiler.is_compiling() or not isinstance(vectors, int):
            # A graph is made once for all sizes, and by rules that a compiler follows.
            return Execution.PROJECT if self.projects else Execution.MATERIALISE
        return execution_for(self.network, self.rank, vectors, learning=torch.is_grad_enabled())

    def to_config(self) -> dict[str, Any]:
        """The structure as JSON values."""
        return self._structure.to_config()

    def extra_repr(self) -> str:
        rows, cols = self.shape
        said = self._structure.description()
        folded = f", modes={said.row_modes} x {said.col_modes}, ranks={said.ranks}" if said.ranks else ""
        return f"{said.layout}, {rows} x {cols}{folded}"


def weight_from_config(config: dict[str, Any]) -> Weight:
    """A weight of the right structure, filled with zeros; the numbers come from a state_dict."""
    return Weight(zeros(config))

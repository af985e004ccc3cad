"""How a factored matrix meets its inputs: three ways, and a cost model that chooses.

A cost is counted in multiplications, with every number that is read or written counting for several.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache

from htcompress.errors import RequestError
from htcompress.matrix.network import Network

_NUMBER = 4
"""What reading or writing a number counts, in multiplications."""

_SMALL_PRODUCTS = 3
"""How many times slower the multiplications of a contraction are than those of one large product."""


_UNKNOWN = 8
"""The rank at which a matrix is taken to be written out where it is no product of two factors."""


class Execution(StrEnum):
    """What is computed of W x.

    `project`: a split layout reduces x to r numbers, which the kernel reads. `contract`: x is contracted with one
    core after the other. `materialise`: W is written out, and kept outside of training.
    """

    AUTO = "auto"
    PROJECT = "project"
    CONTRACT = "contract"
    MATERIALISE = "materialise"


def execution_for(network: Network, rank: int | None, vectors: int, *, learning: bool) -> Execution:
    """The execution of least cost for so many input vectors at a time.

    Args:
        network: the cores of the matrix.
        rank: between rows and columns, where the matrix is a product of a row factor and a column factor.
        vectors: time steps times batch.
        learning: whether gradients are recorded; what is written out is then written out at every call.
    """
    costs = execution_costs(network, rank, vectors, learning)
    return min(costs, key=lambda way: costs[way])


@lru_cache(maxsize=1024)
def execution_costs(network: Network, rank: int | None, vectors: int, learning: bool) -> dict[Execution, float]:
    """The cost of each execution that the matrix admits; see `execution_for`."""
    rows, cols = network.layout.rows, network.layout.cols
    io = _NUMBER * vectors * (rows + cols)
    whole = rows * cols
    written = whole * ((rank or _UNKNOWN) + _NUMBER) if learning else 0
    # Gradients: once more for the input's, once more for the matrix's.
    times = 3 if learning else 1
    costs: dict[Execution, float] = {Execution.MATERIALISE: times * (vectors * whole + _NUMBER * whole) + written + io}
    if rank is not None:
        factors = rank * (rows + cols)
        costs[Execution.PROJECT] = times * (vectors * factors + _NUMBER * factors) + io
    else:
        flops, largest = network.cost(vectors)
        costs[Execution.CONTRACT] = times * (_SMALL_PRODUCTS * flops + _NUMBER * largest) + io
    return costs


def admitted(network: Network, rank: int | None, execution: Execution) -> Execution:
    """What is asked for, where the matrix admits it. Raises `RequestError` where it does not."""
    admits = set(execution_costs(network, rank, 1, False)) | {Execution.AUTO}
    if execution not in admits:
        kind = "paired" if rank is None else "split"
        names = ", ".join(sorted(admits))
        raise RequestError(f"A matrix in a {kind} layout cannot be read by {execution.value!r}; choose among {names}.")
    return execution

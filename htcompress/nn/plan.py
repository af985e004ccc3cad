"""How a matrix in HT form meets its inputs: three plans, and a cost model that chooses.

A cost is counted in multiplications, with every number that is read or written counting for several.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from math import prod

import opt_einsum
import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.errors import RequestError
from htcompress.matrix import HTMatrix, Layout

_NUMBER = 4
"""What reading or writing a number counts, in multiplications."""

_SMALL_PRODUCTS = 3
"""How many times slower the multiplications of a contraction are than those of one large product."""


class Plan(StrEnum):
    """What is computed of W x.

    `project`: a split layout reduces x to r numbers, which the kernel reads. `contract`: x is contracted with one
    core after the other. `materialise`: W is written out, and kept outside of training.
    """

    AUTO = "auto"
    PROJECT = "project"
    CONTRACT = "contract"
    MATERIALISE = "materialise"


def plan_for(layout: Layout, ranks: tuple[int, ...], vectors: int, *, learning: bool) -> Plan:
    """The plan of least cost for so many input vectors at a time.

    Args:
        layout, ranks: of the matrix in HT form.
        vectors: time steps times batch.
        learning: whether gradients are recorded; what is written out is then written out at every call.
    """
    costs = plan_costs(layout, ranks, vectors, learning)
    return min(costs, key=lambda plan: costs[plan])


@lru_cache(maxsize=1024)
def plan_costs(layout: Layout, ranks: tuple[int, ...], vectors: int, learning: bool) -> dict[Plan, float]:
    """The cost of each plan that the layout admits."""
    rows, cols = layout.rows, layout.cols
    rank = ranks[(layout.tree.root.children or (0,))[0]]
    io = _NUMBER * vectors * (rows + cols)
    whole = rows * cols
    written = whole * (rank + _NUMBER) if learning else 0
    # Gradients: once more for the input's, once more for the matrix's.
    times = 3 if learning else 1
    costs: dict[Plan, float] = {Plan.MATERIALISE: times * (vectors * whole + _NUMBER * whole) + written + io}
    if layout.is_split:
        factors = rank * (rows + cols)
        costs[Plan.PROJECT] = times * (vectors * factors + _NUMBER * factors) + io
    else:
        flops, largest = _contraction(layout, ranks, vectors)
        costs[Plan.CONTRACT] = times * (_SMALL_PRODUCTS * flops + _NUMBER * largest) + io
    return costs


@lru_cache(maxsize=1024)
def _contraction(layout: Layout, ranks: tuple[int, ...], vectors: int) -> tuple[float, float]:
    """The multiplications of the planned contraction, and its largest intermediate."""
    shapes = [(vectors, *layout.col_modes), *_core_shapes(layout, ranks)]
    _, info = opt_einsum.contract_path(_equation(layout), *shapes, shapes=True, optimize="auto")
    return float(info.opt_cost) / 2, float(info.largest_intermediate)


def _core_shapes(layout: Layout, ranks: tuple[int, ...]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for node in layout.tree.nodes:
        if node.children is None:
            k = node.leaves[0]
            shapes.append((layout.row_modes[k], layout.col_modes[k], ranks[node.index]))
        else:
            left, right = node.children
            above = () if node.parent is None else (ranks[node.index],)
            shapes.append((ranks[left], ranks[right], *above))
    return shapes


def _equation(layout: Layout) -> str:
    """x with its column modes, the cores by nodes, to the row modes."""
    d = layout.tree.order
    symbol = opt_einsum.get_symbol
    rows, cols = [symbol(1 + k) for k in range(d)], [symbol(1 + d + k) for k in range(d)]
    edges = [symbol(1 + 2 * d + node.index) for node in layout.tree.nodes]
    cores = []
    for node in layout.tree.nodes:
        if node.children is None:
            k = node.leaves[0]
            cores.append(rows[k] + cols[k] + edges[node.index])
        else:
            above = "" if node.parent is None else edges[node.index]
            cores.append("".join(edges[child] for child in node.children) + above)
    batch = symbol(0)
    return ",".join([batch + "".join(cols), *cores]) + "->" + batch + "".join(rows)


@lru_cache(maxsize=256)
def _expression(layout: Layout, ranks: tuple[int, ...], vectors: int) -> Callable[..., Tensor]:
    """The contraction of x with the cores, its order planned once."""
    shapes = [(vectors, *layout.col_modes), *_core_shapes(layout, ranks)]
    return opt_einsum.contract_expression(_equation(layout), *shapes, optimize="auto")


def contract(matrix: HTMatrix, x: Float[Tensor, "*vectors cols"]) -> Float[Tensor, "*vectors rows"]:
    """W x for every vector, core by core along the planned order.

    Padding of the columns is appended to x; that of the rows is cut off.
    """
    layout, tensor = matrix.layout, matrix.tensor
    flat = x.reshape(-1, layout.cols)
    missing = prod(layout.col_modes) - layout.cols
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    shapes = _core_shapes(layout, tensor.ranks)
    cores = [tensor.core(node).reshape(shape) for node, shape in zip(layout.tree.nodes, shapes, strict=True)]
    folded = flat.reshape(-1, *layout.col_modes)
    product = _expression(layout, tensor.ranks, len(flat))(folded, *cores, backend="torch")
    return product.reshape(len(flat), -1)[:, : layout.rows].reshape(*x.shape[:-1], layout.rows)


def admitted(matrix: HTMatrix, plan: Plan) -> Plan:
    """A plan asked for, where the layout admits it. Raises `RequestError` where it does not."""
    admits = set(plan_costs(matrix.layout, matrix.tensor.ranks, 1, False)) | {Plan.AUTO}
    if plan not in admits:
        kind = "split" if matrix.layout.is_split else "paired"
        names = ", ".join(sorted(admits))
        raise RequestError(f"A matrix in a {kind} layout has no plan {plan.value!r}; choose among {names}.")
    return plan

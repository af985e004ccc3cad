"""How the cores of a factored matrix hang together: all that contracting them, or x with them, needs to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import opt_einsum
import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.matrix.layout import Layout
from htcompress.values import mixed_precision


@dataclass(frozen=True)
class Network:
    """A matrix as a contraction of cores; hashable, so that orders of contraction are planned once.

    Args:
        layout: how the matrix is folded into row and column modes.
        legs: for each core the names of its axes: `m0`, `m1`, ... are row modes, `n0`, `n1`, ... column modes,
            anything else a bond between cores.
        shapes: the sizes of these axes.
    """

    layout: Layout
    legs: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]

    def dense(self, cores: Sequence[Tensor]) -> Float[Tensor, "rows cols"]:
        """The matrix; padding is cut off."""
        row_modes, col_modes = self._modes("m"), self._modes("n")
        full = _contraction(self, row_modes + col_modes, None)(*self._reshaped(cores), backend="torch")
        layout = self.layout
        return full.reshape(prod(layout.row_modes), prod(layout.col_modes))[: layout.rows, : layout.cols]

    def times(self, cores: Sequence[Tensor], x: Float[Tensor, "*vectors cols"]) -> Float[Tensor, "*vectors rows"]:
        """W x for every vector, core by core along the planned order.

        Padding of the columns is appended to x; that of the rows is cut off.
        """
        layout = self.layout
        if (mixed := mixed_precision(x.device)) is not None:
            x, cores = x.to(mixed), [core.to(mixed) for core in cores]
        flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
        missing = prod(layout.col_modes) - layout.cols
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing))
        folded = flat.reshape(len(flat), *layout.col_modes)
        expression = _contraction(self, ("x", *self._modes("m")), len(flat))
        product = expression(folded, *self._reshaped(cores), backend="torch")
        rows = product.reshape(len(flat), prod(layout.row_modes))[:, : layout.rows]
        return rows.reshape(*x.shape[:-1], layout.rows)

    def pairs(self) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
        """How `dense` is contracted, product by product: which operands meet, and the axes of what comes of them.

        What meets is taken off the list of operands, what comes of it put at its end. The last product has the axes
        m0, m1, ..., n0, n1, ...
        """
        out = (*self._modes("m"), *self._modes("n"))
        path, _ = opt_einsum.contract_path(equation(self.legs, out), *self.shapes, shapes=True, optimize="auto")
        operands, found = list(self.legs), []
        for chosen in path:
            met = dict.fromkeys(leg for k in chosen for leg in operands[k])
            operands = [legs for k, legs in enumerate(operands) if k not in chosen]
            kept = {leg for legs in operands for leg in legs} | set(out)
            made = tuple(leg for leg in met if leg in kept) if operands else out
            operands.append(made)
            found.append((tuple(chosen), made))
        return found

    def cost(self, vectors: int) -> tuple[float, float]:
        """The multiplications of W x for so many vectors, and the largest intermediate."""
        return _cost(self, vectors)

    def _modes(self, side: str) -> tuple[str, ...]:
        return tuple(f"{side}{k}" for k in range(self.layout.tree.order))

    def _reshaped(self, cores: Sequence[Tensor]) -> list[Tensor]:
        return [core.reshape(shape) for core, shape in zip(cores, self.shapes, strict=True)]

    def _operands(self, vectors: int | None) -> tuple[list[tuple[str, ...]], list[tuple[int, ...]]]:
        legs, shapes = list(self.legs), list(self.shapes)
        if vectors is not None:
            legs.insert(0, ("x", *self._modes("n")))
            shapes.insert(0, (vectors, *self.layout.col_modes))
        return legs, shapes


def equation(legs: Sequence[tuple[str, ...]], out: tuple[str, ...]) -> str:
    """The contraction as einsum writes it, axes in letters."""
    names = dict.fromkeys(name for axes in (*legs, out) for name in axes)
    letters = {name: opt_einsum.get_symbol(k) for k, name in enumerate(names)}
    written = ("".join(letters[name] for name in axes) for axes in (*legs, out))
    *inputs, output = written
    return ",".join(inputs) + "->" + output


@lru_cache(maxsize=512)
def _contraction(network: Network, out: tuple[str, ...], vectors: int | None) -> Callable[..., Tensor]:
    """A contraction, its order planned once."""
    legs, shapes = network._operands(vectors)
    return opt_einsum.contract_expression(equation(legs, out), *shapes, optimize="auto")


@lru_cache(maxsize=1024)
def _cost(network: Network, vectors: int) -> tuple[float, float]:
    legs, shapes = network._operands(vectors)
    written = equation(legs, ("x", *network._modes("m")))
    _, info = opt_einsum.contract_path(written, *shapes, shapes=True, optimize="auto")
    return float(info.opt_cost) / 2, float(info.largest_intermediate)

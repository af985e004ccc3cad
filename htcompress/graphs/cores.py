"""What is elementwise in recurrent cells: found in an ONNX graph by what it computes of gates and states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from htcompress.graphs.affine import Affines
from htcompress.graphs.values import Values

_Monomials = Mapping[tuple[str, ...], float]
"""A polynomial: factors in alphabetical order, and what each product is multiplied by."""

_TERMS = 8
"""Products in a polynomial, at most; those of cells have three."""


@dataclass(frozen=True)
class Core:
    """The elementwise part of a cell.

    Attributes:
        operator: LSTM, GRU or RNN.
        gates: by the letters of ONNX; LSTM: i, o, f, c; GRU: z, r, h; RNN: i. The values with their activations; of a
            GRU h is the candidate, and r is found with what it multiplies.
        states: those that enter it. LSTM: c alone, for h is known by a matrix; GRU: h.
        results: h, and c of an LSTM.
        turned: whether the gate z of a GRU lets the candidate in where ONNX's holds it off.
    """

    operator: str
    gates: Mapping[str, str]
    states: tuple[str, ...]
    results: tuple[str, ...]
    turned: bool = False


@dataclass(frozen=True, eq=False)
class _Polynomials:
    """Values as polynomials in those that Add, Sub, Mul and Neg have not made."""

    values: Values
    whole: set[str] = field(default_factory=set)
    """What is not taken apart: results of cells."""

    def __call__(self, name: str, depth: int = 5) -> _Monomials:
        base = self.values.base(name)
        itself: _Monomials = {(base,): 1.0}
        node = self.values.makers.get(base)
        if node is None or not depth or base in self.whole or node.op_type not in ("Add", "Sub", "Mul", "Neg"):
            return itself
        given = [_number(self.values, i) or self(i, depth - 1) for i in node.input]
        if node.op_type == "Neg":
            return {product: -factor for product, factor in given[0].items()}
        made: dict[tuple[str, ...], float] = {}
        if node.op_type == "Mul":
            for a, x in given[0].items():
                for b, y in given[1].items():
                    product = tuple(sorted((*a, *b)))
                    made[product] = made.get(product, 0.0) + x * y
        else:
            made.update(given[0])
            for product, factor in given[1].items():
                made[product] = made.get(product, 0.0) + (factor if node.op_type == "Add" else -factor)
        made = {product: factor for product, factor in made.items() if abs(factor) > 1e-6}
        return made if 0 < len(made) <= _TERMS else itself


def cores(affines: Affines) -> Iterator[Core]:
    """LSTMs and GRUs in the order in which the graph computes them."""
    values = affines.values
    polynomials = _Polynomials(values)
    tanhs = {values.base(node.input[0]): node.output[0] for node in values.graph.node if node.op_type == "Tanh"}
    multiplied: dict[str, list[onnx.NodeProto]] = {}
    for node in values.graph.node:
        if node.op_type == "Mul":
            for name in node.input:
                multiplied.setdefault(values.base(name), []).append(node)
    if not tanhs or not multiplied:
        return
    for node in values.graph.node:
        if node.op_type not in ("Add", "Sub"):
            continue
        name = node.output[0]
        products = polynomials(name)
        found = _lstm(affines, name, products, tanhs, multiplied) or _gru(affines, name, products)
        if found is not None:
            polynomials.whole.update(values.base(result) for result in found.results)
            yield found


def _lstm(
    affines: Affines,
    name: str,
    products: _Monomials,
    tanhs: Mapping[str, str],
    multiplied: Mapping[str, list[onnx.NodeProto]],
) -> Core | None:
    """c' = f c + i g, and h' = o tanh(c')."""
    if len(products) != 2 or any(len(factors) != 2 or factor != 1.0 for factors, factor in products.items()):
        return None
    kinds = {factors: [affines.activation(one) for one in factors] for factors in products}
    entering = next((p for p, kind in kinds.items() if sorted(kind) == ["Sigmoid", "Tanh"]), None)
    kept = next((p for p in products if p != entering), None)
    if entering is None or kept is None or kinds[kept].count("Sigmoid") != 1:
        return None
    i, g = sorted(entering, key=affines.activation)
    f, c = sorted(kept, key=lambda one: affines.activation(one) != "Sigmoid")
    # An LSTM's state that has come from a Tanh would be a gate of something else.
    own = affines.values.base(name)
    if own not in tanhs:
        return None
    out = affines.values.base(tanhs[own])
    for node in multiplied.get(out, ()):
        others = [one for one in map(affines.values.base, node.input) if one != out]
        if len(others) == 1 and affines.activation(others[0]) == "Sigmoid":
            return Core("LSTM", {"i": i, "o": others[0], "f": f, "c": g}, (c,), (node.output[0], name))
    return None


def _gru(affines: Affines, name: str, products: _Monomials) -> Core | None:
    """h' = n + z h - z n, or with the parts of n and h changed, where n depends on another gate and h."""
    if len(products) != 3:
        return None
    alone = next((p[0] for p, factor in products.items() if len(p) == 1 and factor == 1.0), None)
    pairs = {p: factor for p, factor in products.items() if len(p) == 2}
    if alone is None or len(pairs) != 2:
        return None
    z = next((one for one in next(iter(pairs)) if all(one in p for p in pairs)), None)
    if z is None or affines.activation(z) != "Sigmoid" or pairs.get(_pair(alone, z)) != -1.0:
        return None
    other = next((one for p, factor in pairs.items() if factor == 1.0 for one in p if one != z), None)
    if other is None:
        return None
    kinds = [affines.activation(one) for one in (alone, other)]
    if kinds.count("Tanh") != 1:
        return None
    n, h = (alone, other) if kinds[0] == "Tanh" else (other, alone)
    return Core("GRU", {"z": z, "h": n}, (h,), (name,), turned=n == other)


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one <= other else (other, one)


def _number(values: Values, name: str) -> _Monomials | None:
    """A constant that is one number everywhere, as a polynomial."""
    found = values.constants(name)
    if found is None or not found.size or not (found == found.flat[0]).all() or not np.isfinite(found.flat[0]):
        return None
    return {(): float(found.flat[0])} if found.flat[0] else None

"""What looks like an unrolled recurrent cell and is left as it is; what such cells are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from htcompress.graphs.affine import Affine
from htcompress.graphs.node import Place
from htcompress.graphs.values import Values

_CUTTING = ("Slice", "Split", "Gather", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Cast", "Flatten")
"""Operators that take a state out of what holds several."""


class NotACellError(Exception):
    """What looks like a cell is none that a node of ONNX computes; the text says why."""


class NoCellError(Exception):
    """What was looked at does not even look like a cell."""


@dataclass(frozen=True)
class LeftCell:
    """What looks like a cell and stays as it is.

    Attributes:
        operator: what it looks like.
        name: what it is called.
        reason: why it is left.
        numbers: how many its matrices have.
    """

    operator: str
    name: str
    reason: str
    numbers: int


_RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")


def states_multiplied(values: Values, taken: set[int], known: Sequence[str]) -> Iterator[LeftCell]:
    """Products of matrices with what is cut out of a state: an input, beside others, with an output of its shape.

    Args:
        values: of the outermost graph.
        taken: the nodes of cells.
        known: states of cells; what else reads these is no cell.
    """
    if len(values.inputs) < 2:
        return
    nodes = values.graph.node
    begun = [name for node in nodes if node.op_type in _RECURRENT for name in node.input[5:7]]
    others = {origin_of(values, name) for name in (*known, *begun)}
    kinds = {o.name: (values.kinds.get(o.name), values.shapes.get(o.name)) for o in values.graph.output}
    by_origin: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        if place in taken or node.op_type not in ("MatMul", "Gemm") or values.constants(node.input[1]) is None:
            continue
        given = values.makers.get(values.base(node.input[0]))
        beside = given.input if given is not None and given.op_type == "Concat" else [node.input[0]]
        for origin in {origin_of(values, name) for name in beside} & values.inputs - others:
            ends = {
                name for name, kind in kinds.items() if kind == (values.kinds.get(origin), values.shapes.get(origin))
            }
            if ends & _behind(values, node.output[0]) and _activated(values, node.output[0]):
                by_origin.setdefault(origin, []).append(place)
    for origin, places in by_origin.items():
        own = [nodes[place] for place in places]
        stored = {source for node in own for source in values.constants.sources(node.input[1])}
        numbers = sum(size_of(values, name) for _, name in stored)
        why = f"its matrices multiply the state {origin} for what is no LSTM, GRU or RNN of torch"
        yield LeftCell("", name_of(values, own[0].output[0], frozenset(places), frozenset(stored)), why, numbers)


def _behind(values: Values, name: str, ending: tuple[str, ...] = ()) -> set[str]:
    """What depends on a value; what operators of certain kinds make of it is not looked at."""
    found, waiting = {name}, [name]
    while waiting:
        for place in values.readers.get(waiting.pop(), ()):
            node = values.graph.node[place] if place >= 0 else None
            new = {o for o in node.output if o} - found if node is not None and node.op_type not in ending else set()
            found |= new
            waiting += new
    return found


def _activated(values: Values, name: str) -> bool:
    """Whether a product comes to an activation of gates before another product."""
    behind = _behind(values, name, ("MatMul", "Gemm", "Conv"))
    made = (values.makers.get(one) for one in behind)
    return any(node is not None and node.op_type in ("Sigmoid", "Tanh", "HardSigmoid") for node in made)


def name_of(values: Values, result: str, inner: frozenset[int], sources: frozenset[tuple[Place, str]]) -> str:
    """What the names of a cell's matrices begin with; else those of its nodes; else what it puts out."""
    nodes = [values.graph.node[place] for place in inner]
    for names in (sorted(name for _, name in sources), [node.name or node.output[0] for node in nodes]):
        shared = _beginning(names) if len(names) > 1 else ""
        cut = max(shared.rfind("/"), shared.rfind("."))
        if cut > 0 and not shared.startswith("onnx::"):
            return shared[:cut]
    return result


def origin_of(values: Values, name: str) -> str:
    """What a value is cut out of."""
    node = values.makers.get(name)
    while node is not None and node.op_type in _CUTTING:
        name = node.input[0]
        node = values.makers.get(name)
    return name


def size_of(values: Values, name: str) -> int:
    """How many weights a constant is; none where it is a shape or an index."""
    found = values.constants(name)
    return 0 if found is None or (found.dtype.kind != "f" and found.dtype.itemsize > 1) else found.size


def _beginning(names: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(names), max(names)
    return next((first[:k] for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), first)


def leaves_of(gates: Iterable[Affine]) -> dict[str, int]:
    """What the gates multiply, and how wide that is. Raises `NotACellError` where they do not all read the same."""
    every = [{leaf: len(matrix) for leaf, matrix in gate.parts.items()} for gate in gates]
    if any(one != every[0] for one in every):
        raise NotACellError("has gates that read different values")
    return every[0]

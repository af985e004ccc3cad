"""A compressed layer as ONNX nodes: its cores, a few products of them, one LSTM, GRU or RNN node for each layer.

The graph stores the cores and nothing else; what is computed of cores alone, a runtime computes once when it loads
the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

from htcompress.errors import RequestError
from htcompress.exporting.graph import Graph
from htcompress.matrix import HTMatrix
from htcompress.matrix.factored import Factored
from htcompress.matrix.network import equation
from htcompress.nn.gates import GateWeights
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.settings import Kind, RecurrentSettings
from htcompress.nn.weights import DenseWeight, FactoredWeight, Weight
from htcompress.tensor.tree import Node

_OPERATORS = {Kind.LSTM: "LSTM", Kind.GRU: "GRU", Kind.RNN_TANH: "RNN", Kind.RNN_RELU: "RNN"}
_ATTRIBUTES = {Kind.GRU: {"linear_before_reset": 1}}
_ORDER = {Kind.LSTM: (0, 3, 1, 2), Kind.GRU: (1, 0, 2)}
"""Torch's gates in the order of ONNX: i o f c of i f g o, z r h of r z n."""


def check_expressible(settings: RecurrentSettings, name: str) -> None:
    """Raise `RequestError` where ONNX's operators cannot do what the layer does."""
    if settings.proj_size:
        raise RequestError(
            f"Layer {name or '(top level)'} has a projection (proj_size={settings.proj_size}), which ONNX's LSTM "
            f"operator does not have. Export it with --to dense."
        )


@dataclass(frozen=True)
class _Slot:
    """What the node takes for one direction: names of values.

    `reduce` (inputs, features) turns the input into what `w` (rows, features) reads; without it `w` reads the input.
    """

    reduce: str | None
    features: int
    w: str
    r: str
    b: str | None


def add_recurrent(
    graph: Graph, module: HTRecurrent, x: str, state: Sequence[str], *, lengths: str = ""
) -> tuple[str, list[str]]:
    """Add the nodes of a layer.

    Args:
        graph: where to.
        module: the compressed layer or cell; see `check_expressible`.
        x: the input, (time, batch, features).
        state: (h,) or (h, c), each (layers * directions, batch, size).
        lengths: of the sequences, (batch,) in int32; by default all are as long as the input.

    Returns:
        the outputs (time, batch, directions * size), zero behind the end of a sequence, and the last states.
    """
    s = module.settings
    slots = [_slot(graph, gates, name) for name, gates in module.slots().items()]
    last: list[list[str]] = []
    for layer in range(s.num_layers):
        start, stop = layer * s.directions, (layer + 1) * s.directions
        initial = [graph.cut(value, start, stop) for value in state]
        x, after = _layer(graph, s, x, slots[start:stop], initial, lengths)
        last.append(after)
    return x, [graph.concat(parts, 0) for parts in zip(*last, strict=True)]


def _layer(
    graph: Graph, s: RecurrentSettings, x: str, slots: Sequence[_Slot], initial: Sequence[str], lengths: str
) -> tuple[str, list[str]]:
    if any(slot.reduce is not None for slot in slots):
        parts = [x if slot.reduce is None else graph.add("MatMul", x, slot.reduce) for slot in slots]
        x = graph.concat(parts, 2)
        widths = [slot.features for slot in slots]
        # Directions that reduce the input differently read it side by side, each blind to the other's part.
        ws = [
            slot.w if len(slots) == 1 else graph.concat(_beside(graph, slot.w, s.rows, widths, k), 1)
            for k, slot in enumerate(slots)
        ]
    else:
        ws = [slot.w for slot in slots]

    def stacked(values: Sequence[str]) -> str:
        return graph.concat([graph.unsqueeze(value, 0) for value in values], 0)

    biases = [slot.b for slot in slots if slot.b is not None]
    inputs = [x, stacked(ws), stacked([slot.r for slot in slots]), stacked(biases) if biases else "", lengths, *initial]
    attributes: dict[str, Any] = {"hidden_size": s.hidden_size, **_ATTRIBUTES.get(s.kind, {})}
    if s.kind is Kind.RNN_RELU:
        attributes["activations"] = ["Relu"] * s.directions
    if s.bidirectional:
        attributes["direction"] = "bidirectional"
    y, *after = graph.add_many(_OPERATORS[s.kind], inputs, 3 if s.kind is Kind.LSTM else 2, **attributes)
    # (time, directions, batch, size): torch has the directions beside each other.
    turned = graph.add("Transpose", y, perm=[0, 2, 1, 3])
    return graph.reshape(turned, 0, 0, s.directions * s.hidden_size), after


def _beside(graph: Graph, w: str, rows: int, widths: Sequence[int], own: int) -> list[str]:
    return [w if k == own else graph.zeros(rows, width) for k, width in enumerate(widths)]


def _slot(graph: Graph, gates: GateWeights, name: str) -> _Slot:
    s, n = gates.settings, gates.input_size

    def rows(value: str) -> str:
        return _reordered(graph, s, _taken(graph, gates, value, units=False))

    def states(value: str, axis: int) -> str:
        return _taken(graph, gates, value, units=True, axis=axis)

    if gates.joint is not None:
        end = n + s.state_size
        columns = gates.joint.layout.cols - end
        if gates.joint.projects:
            left, right = _factors(graph, gates.joint, f"{name}.joint")
            left = rows(left)
            reduce, features = graph.cut(right, 0, n), gates.joint.rank or 0
            w, r = left, _times_transposed(graph, left, states(graph.cut(right, n, end), 0))
            beyond = _times_transposed(graph, left, graph.cut(right, end, end + columns)) if columns else None
        else:
            whole = rows(_matrix(graph, gates.joint, f"{name}.joint"))
            reduce, features = None, n
            w, r = graph.cut(whole, 0, n, 1), states(graph.cut(whole, n, end, 1), 1)
            beyond = graph.cut(whole, end, end + columns, 1) if columns else None
        b = _bias_columns(graph, s, beyond, columns) if beyond is not None else _bias(graph, gates, name)
        return _Slot(reduce, features, w, r, b)
    if gates.ih is None or gates.hh is None:
        raise RuntimeError("A layer's weights are one joint matrix, or those of the input and of the state.")
    r = states(rows(_matrix(graph, gates.hh, f"{name}.hh")), 1)
    b = _bias(graph, gates, name)
    if isinstance(gates.ih, FactoredWeight) and gates.ih.projects:
        left, right = _factors(graph, gates.ih, f"{name}.ih")
        return _Slot(right, gates.ih.rank or 0, rows(left), r, b)
    return _Slot(None, n, rows(_matrix(graph, gates.ih, f"{name}.ih")), r, b)


def _taken(graph: Graph, gates: GateWeights, value: str, *, units: bool, axis: int = 0) -> str:
    """Rows, or units, of a stored matrix in the units' own order."""
    places = gates.places()
    return value if places is None else graph.add("Gather", value, graph.whole(*places[units].tolist()), axis=axis)


def _reordered(graph: Graph, s: RecurrentSettings, value: str, columns: bool = True) -> str:
    """Rows gate by gate, in the order of ONNX."""
    if s.kind not in _ORDER:
        return value
    rest = [-1] if columns else []
    parted = graph.reshape(value, s.kind.gates, s.hidden_size, *rest)
    turned = graph.add("Gather", parted, graph.whole(*_ORDER[s.kind]), axis=0)
    return graph.reshape(turned, s.rows, *rest)


def _bias(graph: Graph, gates: GateWeights, name: str) -> str | None:
    """[b_ih, b_hh] of a merged bias, and of what a GRU keeps apart."""
    s = gates.settings
    if gates.bias is None:
        return None
    merged = _reordered(graph, s, graph.numbers(gates.bias, f"{name}.bias"), columns=False)
    if gates.bias_hn is None:
        return graph.concat([merged, graph.zeros(s.rows)], 0)
    # ONNX has the candidate last, too.
    return graph.concat([merged, graph.zeros(2 * s.hidden_size), graph.numbers(gates.bias_hn, f"{name}.bias_hn")], 0)


def _bias_columns(graph: Graph, s: RecurrentSettings, columns: str, count: int) -> str:
    """[b_ih, b_hh] of the columns that a joint matrix has for them, their rows in order already."""
    if count == 1:
        return graph.concat([graph.reshape(columns, s.rows), graph.zeros(s.rows)], 0)
    return graph.reshape(graph.add("Transpose", columns, perm=[1, 0]), 2 * s.rows)


def _times_transposed(graph: Graph, left: str, right: str) -> str:
    return graph.add("MatMul", left, graph.add("Transpose", right, perm=[1, 0]))


def _matrix(graph: Graph, weight: Weight, name: str) -> str:
    """The matrix of a weight, computed from its cores."""
    if isinstance(weight, DenseWeight):
        return graph.numbers(weight.weight, name)
    if weight.rank is not None:
        left, right = _factors(graph, weight, name)
        return _times_transposed(graph, left, right)
    return _contracted(graph, weight.matrix(), name)


def _factors(graph: Graph, weight: FactoredWeight, name: str) -> tuple[str, str]:
    """R (rows, r) and C (cols, r) of a split layout: the frames of the root's children, padding cut off."""
    matrix = weight.matrix()
    assert isinstance(matrix, HTMatrix)
    tree = matrix.layout.tree
    sides = []
    for child, size in zip(tree.root.children or (), (matrix.layout.rows, matrix.layout.cols), strict=True):
        node = tree.nodes[child]
        frame = _in_order(graph, matrix, node, _frame(graph, matrix, node, name))
        padded = prod(matrix.layout.shape[k] for k in node.leaves)
        sides.append(frame if padded == size else graph.cut(frame, 0, size))
    left, right = sides
    root = matrix.tensor.cores[tree.root.index]
    if root is not None:
        left = graph.add("MatMul", left, graph.numbers(root[:, :, 0], f"{name}.root"))
    return left, right


def _frame(graph: Graph, matrix: HTMatrix, node: Node, name: str) -> str:
    """A node's frame (product of its modes, rank), of two products for each inner node below."""
    core = matrix.network.shapes[node.index]
    if node.children is None:
        return _core(graph, matrix, node.index, (prod(core[:-1]), core[-1]), name)
    left, right = (_frame(graph, matrix, matrix.layout.tree.nodes[child], name) for child in node.children)
    a, b, rank = core
    # (modes left, a) times (a, b r), then each (b, r) from the left by (modes right, b).
    half = graph.add("MatMul", left, _core(graph, matrix, node.index, (a, b * rank), name))
    return graph.reshape(graph.add("MatMul", right, graph.reshape(half, -1, b, rank)), -1, rank)


def _core(graph: Graph, matrix: Factored, index: int, shape: Sequence[int], name: str) -> str:
    """A core, reshaped; identities are not stored."""
    stored = matrix.cores[index]
    if stored is not None:
        return graph.numbers(stored.reshape(tuple(shape)), f"{name}.{index}")
    return graph.reshape(graph.eye(isqrt(prod(shape))), *shape)


def _in_order(graph: Graph, matrix: HTMatrix, node: Node, frame: str) -> str:
    """The frame's rows with the modes in ascending order, whatever the order of the leaves."""
    leaves = list(node.leaves)
    if leaves == sorted(leaves):
        return frame
    parted = graph.reshape(frame, *(matrix.layout.shape[k] for k in leaves), -1)
    order = sorted(range(len(leaves)), key=lambda i: leaves[i])
    turned = graph.add("Transpose", parted, perm=[*order, len(leaves)])
    return graph.reshape(turned, -1, matrix.tensor.ranks[node.index])


def _contracted(graph: Graph, matrix: Factored, name: str) -> str:
    """Any other layout, written out product by product."""
    network, layout = matrix.network, matrix.layout
    values = [(_core(graph, matrix, k, shape, name), network.legs[k]) for k, shape in enumerate(network.shapes)]
    for chosen, legs in network.pairs():
        met = [values[k] for k in chosen]
        values = [value for k, value in enumerate(values) if k not in chosen]
        # Letters anew for each product: ONNX has but the alphabet's.
        written = equation([axes for _, axes in met], legs)
        values.append((graph.add("Einsum", *(value for value, _ in met), equation=written), legs))
    rows, cols = prod(layout.row_modes), prod(layout.col_modes)
    whole = graph.reshape(values[-1][0], rows, cols)
    if rows > layout.rows:
        whole = graph.cut(whole, 0, layout.rows, 0)
    return graph.cut(whole, 0, layout.cols, 1) if cols > layout.cols else whole

"""A compressed layer as ONNX nodes: its cores, a few products of them, one LSTM, GRU or RNN node for each layer.

The graph stores the cores and nothing else; what is computed of cores alone, a runtime computes once when it loads
the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import numpy as np
from torch import Tensor

from htcompress.errors import RequestError
from htcompress.exporting.codecs import stored
from htcompress.exporting.graph import EINSUM, Graph
from htcompress.matrix.network import Network, equation
from htcompress.nn.activations import ACTIVATIONS
from htcompress.nn.gates import GateWeights
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.settings import RecurrentSettings


def check_expressible(settings: RecurrentSettings, name: str) -> None:
    """Raise `RequestError` where ONNX's operators cannot do what the layer does."""
    if settings.proj_size:
        raise RequestError(
            f"Layer {name or '(top level)'} has a projection (proj_size={settings.proj_size}), which ONNX's LSTM "
            f"operator does not have. Export it with --to dense."
        )


@dataclass(frozen=True)
class _Direction:
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
    directions = [_direction(graph, gates, name) for name, gates in module.directions().items()]
    last: list[list[str]] = []
    for layer in range(s.num_layers):
        start, stop = layer * s.num_directions, (layer + 1) * s.num_directions
        initial = [graph.cut(value, start, stop) for value in state]
        x, after = _layer(graph, s, x, directions[start:stop], initial, lengths)
        last.append(after)
    return x, [graph.concat(parts, 0) for parts in zip(*last, strict=True)]


def add_node(
    graph: Graph, module: HTRecurrent, x: str, initial: Sequence[str], *, lengths: str = "", reverse: bool = False
) -> list[str]:
    """Add the nodes of a module with one layer, in place of one node of ONNX.

    Args:
        x: (time, batch, features).
        initial: states, each (directions, batch, size) or empty; none: all begin with zeros.
        reverse: whether the one direction reads from the end.

    Returns:
        what the operator gives: Y (time, directions, batch, size), Y_h and for an LSTM Y_c.
    """
    s = module.settings
    directions = [_direction(graph, gates, name) for name, gates in module.directions().items()]
    return _operator(graph, s, x, directions, initial, lengths, "reverse" if reverse else "forward")


def _layer(
    graph: Graph, s: RecurrentSettings, x: str, directions: Sequence[_Direction], initial: Sequence[str], lengths: str
) -> tuple[str, list[str]]:
    y, *after = _operator(graph, s, x, directions, initial, lengths)
    # (time, directions, batch, size): torch has the directions beside each other.
    turned = graph.add("Transpose", y, perm=[0, 2, 1, 3])
    return graph.reshape(turned, 0, 0, s.num_directions * s.hidden_size), after


def _operator(
    graph: Graph,
    s: RecurrentSettings,
    x: str,
    directions: Sequence[_Direction],
    initial: Sequence[str],
    lengths: str,
    direction: str = "forward",
) -> list[str]:
    if any(direction.reduce is not None for direction in directions):
        parts = [
            x if direction.reduce is None else graph.add("MatMul", x, direction.reduce) for direction in directions
        ]
        x = graph.concat(parts, 2)
        widths = [direction.features for direction in directions]
        # Directions that reduce the input differently read it side by side, each blind to the other's part.
        ws = [
            direction.w if len(directions) == 1 else graph.concat(_beside(graph, direction.w, s.rows, widths, k), 1)
            for k, direction in enumerate(directions)
        ]
    else:
        ws = [direction.w for direction in directions]

    def stacked(values: Sequence[str]) -> str:
        return graph.concat([graph.unsqueeze(value, 0) for value in values], 0)

    biases = [direction.b for direction in directions if direction.b is not None]
    inputs = [
        x,
        stacked(ws),
        stacked([direction.r for direction in directions]),
        stacked(biases) if biases else "",
        lengths,
        *initial,
    ]
    operator = s.recurrence.onnx
    attributes: dict[str, Any] = {"hidden_size": s.hidden_size, **operator.attributes}
    if operator.activations:
        own = [ACTIVATIONS[word] for word in operator.activations] * s.num_directions
        attributes["activations"] = [activation.onnx for activation in own]
        for name in ("alpha", "beta"):
            # Of those functions that take one.
            if given := [value for a in own if (value := getattr(a, name)) is not None]:
                attributes[f"activation_{name}"] = given
    attributes["direction"] = "bidirectional" if s.bidirectional else direction
    while inputs[-1] == "":
        inputs.pop()
    return graph.add_many(operator.name, inputs, 1 + s.recurrence.states, **attributes)


def _beside(graph: Graph, w: str, rows: int, widths: Sequence[int], own: int) -> list[str]:
    return [w if k == own else graph.zeros(rows, width) for k, width in enumerate(widths)]


def _direction(graph: Graph, gates: GateWeights, name: str) -> _Direction:
    s, n = gates.settings, gates.input_size

    def rows(value: str) -> str:
        return _reordered(graph, s, _taken(graph, gates, value, units=False))

    def states(value: str, axis: int) -> str:
        return _taken(graph, gates, value, units=True, axis=axis)

    if gates.joint is not None:
        end = n + s.state_size
        columns = gates.joint.shape[1] - end
        if gates.joint.projects:
            left, right = _factors(graph, gates, "joint", name)
            left = rows(left)
            reduce, features = _scaled(graph, gates, graph.cut(right, 0, n), 0), gates.joint.rank or 0
            w, r = left, _times_transposed(graph, left, states(graph.cut(right, n, end), 0))
            beyond = _times_transposed(graph, left, graph.cut(right, end, end + columns)) if columns else None
        else:
            whole = rows(_matrix(graph, gates, "joint", name))
            reduce, features = None, n
            w = _scaled(graph, gates, graph.cut(whole, 0, n, 1), 1)
            r = states(graph.cut(whole, n, end, 1), 1)
            beyond = graph.cut(whole, end, end + columns, 1) if columns else None
        b = _bias_columns(graph, s, beyond, columns) if beyond is not None else _bias(graph, gates, name)
        return _Direction(reduce, features, w, r, b)
    if gates.ih is None or gates.hh is None:
        raise RuntimeError("A layer's weights are one joint matrix, or those of the input and of the state.")
    r = states(rows(_matrix(graph, gates, "hh", name)), 1)
    b = _bias(graph, gates, name)
    if gates.ih.projects:
        left, right = _factors(graph, gates, "ih", name)
        return _Direction(_scaled(graph, gates, right, 0), gates.ih.rank or 0, rows(left), r, b)
    return _Direction(None, n, _scaled(graph, gates, rows(_matrix(graph, gates, "ih", name)), 1), r, b)


def _scaled(graph: Graph, gates: GateWeights, value: str, axis: int) -> str:
    """What reads the inputs, along an axis of a stored matrix, as it reads them as they are."""
    if gates.input_exponents is None:
        return value
    shape = (-1, 1) if axis == 0 else (1, -1)
    exponents = graph.cast(graph.once(gates.input_exponents.reshape(shape).tolist(), np.int8), "FLOAT")
    return graph.add("Mul", value, graph.add("Pow", graph.cast(graph.whole(2), "FLOAT"), exponents))


def _taken(graph: Graph, gates: GateWeights, value: str, *, units: bool, axis: int = 0) -> str:
    """Rows, or units, of a stored matrix in the units' own order."""
    places, s = gates.places(), gates.settings
    if places is None:
        return value
    order = graph.once(places[True].tolist(), np.int32)
    if units:
        return graph.add("Gather", value, order, axis=axis)
    # The rows of every gate stand in the same order.
    parted = graph.add("Gather", graph.reshape(value, s.gates, s.hidden_size, -1), order, axis=1)
    return graph.reshape(parted, s.rows, -1)


def _reordered(graph: Graph, s: RecurrentSettings, value: str, columns: bool = True) -> str:
    """Rows gate by gate, in the order of ONNX."""
    order = s.recurrence.onnx.gate_order
    if order == tuple(range(s.gates)):
        return value
    rest = [-1] if columns else []
    parted = graph.reshape(value, s.gates, s.hidden_size, *rest)
    turned = graph.add("Gather", parted, graph.whole(*order), axis=0)
    return graph.reshape(turned, s.rows, *rest)


def _bias(graph: Graph, gates: GateWeights, name: str) -> str | None:
    """[b_ih, b_hh] of a merged bias, and of what a GRU keeps apart."""
    s = gates.settings
    if gates.bias is None:
        return None
    merged = _reordered(graph, s, _numbers(graph, gates, "bias", name), columns=False)
    if gates.bias_hn is None:
        return graph.concat([merged, graph.zeros(s.rows)], 0)
    # ONNX has the candidate last, too.
    return graph.concat([merged, graph.zeros(2 * s.hidden_size), _numbers(graph, gates, "bias_hn", name)], 0)


def _bias_columns(graph: Graph, s: RecurrentSettings, columns: str, count: int) -> str:
    """[b_ih, b_hh] of the columns that a joint matrix has for them, their rows in order already."""
    if count == 1:
        return graph.concat([graph.reshape(columns, s.rows), graph.zeros(s.rows)], 0)
    return graph.reshape(graph.add("Transpose", columns, perm=[1, 0]), 2 * s.rows)


def _times_transposed(graph: Graph, left: str, right: str) -> str:
    return graph.add("MatMul", left, graph.add("Transpose", right, perm=[1, 0]))


def _matrix(graph: Graph, gates: GateWeights, which: str, name: str) -> str:
    """A matrix, computed from its cores."""
    matrix = gates.weights()[which].matrix()
    if matrix.factor_networks is not None:
        left, right = _factors(graph, gates, which, name)
        return _times_transposed(graph, left, right)
    cores = _cores(graph, gates, which, name)
    return cores[0] if matrix.network is None else _contracted(graph, matrix.network, cores)


def _factors(graph: Graph, gates: GateWeights, which: str, name: str) -> tuple[str, str]:
    """R (rows, r) and C (cols, r), padding cut off."""
    parts = gates.weights()[which].matrix().factor_networks
    if parts is None:
        raise ValueError("Only a split layout has row and column factors.")
    cores = _cores(graph, gates, which, name)
    left, right = (_contracted(graph, part.network, [cores[k] for k in part.cores]) for part in parts)
    return left, right


def _cores(graph: Graph, gates: GateWeights, which: str, name: str) -> list[str]:
    """The cores of a matrix; identities are not stored."""
    matrix = gates.weights()[which].matrix()
    return [
        _numbers(graph, gates, f"{which}.{own}", name)
        if isinstance(core, Tensor)
        else graph.reshape(graph.eye(isqrt(prod(core.shape))), *core.shape)
        for own, core in zip(matrix.core_names, matrix.cores, strict=True)
    ]


def _numbers(graph: Graph, gates: GateWeights, parameter: str, name: str) -> str:
    """A parameter, stored as its codec stores it."""
    values, codec, scales = gates.stored(parameter)
    return stored(graph, values, f"{name}.{parameter}", codec, scales)


def _contracted(graph: Graph, network: Network, cores: Sequence[str]) -> str:
    """A network of cores, written out product by product."""
    layout = network.layout
    sizes = {
        leg: n
        for legs, shape in zip(network.legs, network.shapes, strict=True)
        for leg, n in zip(legs, shape, strict=True)
    }
    values = [
        (graph.reshape(core, *shape), legs)
        for core, shape, legs in zip(cores, network.shapes, network.legs, strict=True)
    ]
    for chosen, legs in network.pairs():
        met = [values[k] for k in chosen]
        values = [value for k, value in enumerate(values) if k not in chosen]
        values.append((_product(graph, met, legs, sizes), legs))
    rows, cols = prod(layout.row_modes), prod(layout.col_modes)
    whole = graph.reshape(values[-1][0], rows, cols)
    if rows > layout.rows:
        whole = graph.cut(whole, 0, layout.rows, 0)
    return graph.cut(whole, 0, layout.cols, 1) if cols > layout.cols else whole


_Value = tuple[str, tuple[str, ...]]
"""A value of the graph, and the names of its axes."""


def _product(graph: Graph, met: Sequence[_Value], out: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    """The contraction of values over the axes that are not in `out`: a matrix product where it is one."""
    met = [_without_ones(graph, value, legs, out, sizes) for value, legs in met]
    if len(met) == 1 and set(met[0][1]) == set(out):
        return graph.turned(*met[0], out)
    if len(met) != 2 or not set(met[0][1]) ^ set(met[1][1]) <= set(out):
        if graph.opset < EINSUM:
            raise RequestError(
                f"A paired layout needs opset {EINSUM}, and the model has {graph.opset}. Give --layout split."
            )
        # Letters anew for each product: ONNX has but the alphabet's.
        written = equation([axes for _, axes in met], out)
        return graph.add("Einsum", *(value for value, _ in met), equation=written)
    (left, left_legs), (right, right_legs) = met
    both = [leg for leg in left_legs if leg in right_legs]
    kept, summed = [leg for leg in both if leg in out], [leg for leg in both if leg not in out]
    rows = [leg for leg in left_legs if leg not in both]
    cols = [leg for leg in right_legs if leg not in both]
    inner, beside = prod(sizes[leg] for leg in summed), [prod(sizes[leg] for leg in kept)] if kept else []
    a = graph.reshape(graph.turned(left, left_legs, (*kept, *rows, *summed)), *beside, -1, inner)
    b = graph.reshape(graph.turned(right, right_legs, (*kept, *summed, *cols)), *beside, inner, -1)
    made = graph.reshape(graph.add("MatMul", a, b), *(sizes[leg] for leg in (*kept, *rows, *cols)))
    return graph.turned(made, (*kept, *rows, *cols), out)


def _without_ones(
    graph: Graph, value: str, legs: tuple[str, ...], out: tuple[str, ...], sizes: Mapping[str, int]
) -> _Value:
    """A value without axes of size 1 that are summed over."""
    kept = tuple(leg for leg in legs if sizes[leg] > 1 or leg in out)
    return (value, legs) if kept == legs else (graph.reshape(value, *(sizes[leg] for leg in kept)), kept)

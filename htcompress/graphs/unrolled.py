"""Unrolled cells as nodes: a graph in which each stands as the LSTM, GRU or RNN of one step that it computes.

Everything that works on recurrent nodes then works on them: finding, twins, proof on data, replacing. A cell becomes a
node only after onnxruntime has answered alike with both, on numbers that are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from htcompress.graphs.branches import every_graph, graph_at
from htcompress.graphs.cells import Cell, cells_of, same_matrices
from htcompress.graphs.left_cells import LeftCell
from htcompress.graphs.node import Place
from htcompress.graphs.nodes import candidates, opset_of
from htcompress.graphs.replaced import drop_unread, names_of

_ALIKE = 1e-4
"""How far a node may be from its cell, relative to the states: both round, in another order."""

_DRAWS = ((1.0, 0), (0.1, 1))
"""How large the numbers are that a cell is tried on, and their seeds. Large ones leave gates open or shut."""

_WEIGHTS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16, TensorProto.INT8)
"""Types of numbers that are counted as weights."""


def rolled(model: onnx.ModelProto) -> tuple[list[Cell], dict[str, str]]:
    """The cells of a model that can stand as nodes, each under a name of its own; of the others the reason, by name."""
    found, left = cells_of(model)
    taken = names_of(model.graph) if found or left else set()
    called = {node.name for _, graph in every_graph(model.graph) for node in graph.node}
    cells: list[Cell] = []
    unlike: set[tuple[Place, str]] = set()
    for cell in found:
        free = (n for n in candidates(cell.name) if n not in called)
        name = next(n for n in free if not any(one.startswith(f"{n}/rolled/") for one in taken))
        called.add(name)
        named = replace(cell, name=name)
        why = None if cell.sources & unlike else _unlike(model, named)
        if why is not None:
            left.append(LeftCell(cell.operator, cell.name, why, cell.numbers))
            unlike |= cell.sources
        first = next((one for one in cells if one.sources & cell.sources and same_matrices(one, cell)), named)
        cells.append(replace(named, stock=first.name))
    # Where one step stays as it was, its matrices do, and the others gain nothing.
    cells = [cell for cell in cells if not cell.sources & unlike]
    total = _numbers(model) if left else 0
    reasons: dict[str, str] = {}
    for one in left:
        own = one.name.replace(".", "_").strip("/") or "cell"
        reasons[next(n for n in candidates(own) if n not in reasons)] = _said(one, total)
    return cells, reasons


def _said(left: LeftCell, total: int) -> str:
    looks = f"looks like an unrolled {left.operator} cell" if left.operator else "looks like an unrolled recurrent cell"
    share = f"{100 * left.numbers / max(1, total):.2g} % of the numbers"
    return f"{looks} ({share}), but {left.reason}"


def _numbers(model: onnx.ModelProto) -> int:
    """How many weights a model has."""
    count = 0
    for _, graph in every_graph(model.graph):
        tensors = [*graph.initializer, *(a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute)]
        count += sum(prod(tensor.dims) for tensor in tensors if tensor.data_type in _WEIGHTS)
    return count


def rerolled(model: onnx.ModelProto, cells: Sequence[Cell]) -> onnx.ModelProto:
    """A copy of the model with some of its cells as nodes. What nobody reads any more is dropped; all else stays."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if not cells:
        return made
    # Inner graphs first: those around them are copied when their nodes are set anew.
    for place in sorted({cell.place for cell in cells}, key=len, reverse=True):
        _roll(graph_at(made.graph, place), [cell for cell in cells if cell.place == place])
    made.ir_version = max(made.ir_version, 4)  # initializers that are no inputs
    drop_unread(model, made)
    return made


def _roll(graph: onnx.GraphProto, cells: Sequence[Cell]) -> None:
    places = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    instead: dict[int, list[onnx.NodeProto]] = {}
    for cell in cells:
        nodes, numbers = _node(cell)
        there = {number.name for number in graph.initializer}
        # Behind all that enters it: whoever reads a result comes later.
        given = [places[name] for name in (*(leaf for leaf, _ in cell.x), *cell.states) if name in places]
        instead.setdefault(max(given, default=-1), []).extend(nodes)
        graph.initializer.extend(number for number in numbers if number.name not in there)
    gone = frozenset[int]().union(*(cell.inner for cell in cells))
    every = list(instead.get(-1, []))
    for k, node in enumerate(graph.node):
        every += [] if k in gone else [node]
        every += instead.get(k, [])
    del graph.node[:]
    graph.node.extend(every)


def _node(cell: Cell) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The node of a cell, with what brings its values into their shapes, and the numbers of both."""
    prefix, stock = f"{cell.name}/rolled", f"{cell.stock or cell.name}/rolled"
    numbers = {f"{stock}/{name}": array for name, array in cell.weights.items()}
    nodes: list[onnx.NodeProto] = []

    def reshaped(value: str, shape: Sequence[int], out: str, tag: str) -> str:
        numbers[f"{prefix}/{tag} shape"] = np.array(shape, np.int64)
        nodes.append(helper.make_node("Reshape", [value, f"{prefix}/{tag} shape"], [out], f"{prefix}/{tag}"))
        return out

    parts = [reshaped(leaf, (1, -1, n), f"{prefix}/x{k}", f"x{k}") for k, (leaf, n) in enumerate(cell.x)]
    x = parts[0]
    if len(parts) > 1:
        x = f"{prefix}/x"
        nodes.append(helper.make_node("Concat", parts, [x], x, axis=2))
    states = [
        reshaped(state, (1, -1, cell.hidden), f"{prefix}/{tag}_0", f"{tag}_0")
        for state, tag in zip(cell.states, "hc", strict=False)
    ]
    biases = f"{stock}/B" if "B" in cell.weights else ""
    given = [x, f"{stock}/W", f"{stock}/R", biases, "", *states]
    ends = [f"{prefix}/{tag}_n" for tag in "hc"[: len(states)]]
    made = helper.make_node(cell.operator, given, ["", *ends], cell.name, hidden_size=cell.hidden)
    if cell.operator == "GRU" and not cell.resets_before:
        made.attribute.append(helper.make_attribute("linear_before_reset", 1))
    if cell.relu:
        made.attribute.append(helper.make_attribute("activations", ["Relu"]))
    nodes.append(made)
    for end, result, shape, tag in zip(ends, cell.results, cell.shapes, "hc", strict=False):
        reshaped(end, shape, result, f"{tag}_n")
    return nodes, [numpy_helper.from_array(array, name) for name, array in numbers.items()]


def _unlike(model: onnx.ModelProto, cell: Cell) -> str | None:
    """Why a cell's node does not answer as the cell does, tried alone on numbers that are drawn; None where it does."""
    alone = _alone(model, cell)
    nodes, numbers = _node(cell)
    node = onnx.ModelProto()
    node.CopyFrom(alone)
    del node.graph.node[:], node.graph.initializer[:]
    node.graph.node.extend(nodes)
    node.graph.initializer.extend(numbers)
    try:
        sessions = [_session(one) for one in (alone, node)]
        for scale, seed in _DRAWS:
            for feed in _feeds(cell, scale, seed):
                try:
                    wanted = sessions[0].run(list(cell.results), feed)
                except Exception:
                    continue  # not of this many rows
                for a, b in zip(sessions[1].run(list(cell.results), feed), wanted, strict=True):
                    far = float(np.abs(a - b).max()) / max(1.0, float(np.abs(b).max())) if a.shape == b.shape else 1.0
                    if not far <= _ALIKE:
                        return f"its node would answer otherwise (apart by {far:.2g})"
                break
            else:
                return "it cannot be run alone, to see that a node answers alike"
    except Exception as error:
        return f"its node cannot be run beside it ({str(error).splitlines()[0][:120]})"
    return None


def _given(cell: Cell) -> dict[str, int]:
    """What enters a cell, and how wide it is."""
    return {**dict(cell.x), **dict.fromkeys(cell.states, cell.hidden)}


def _alone(model: onnx.ModelProto, cell: Cell) -> onnx.ModelProto:
    """The part of a model between what enters a cell and what it puts out."""
    graph = onnx.GraphProto(name="cell")
    around = [graph_at(model.graph, cell.place[:depth]) for depth in range(len(cell.place) + 1)]
    nodes = [node for own in around for node in own.node]
    makers = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    given = _given(cell)
    wanted, waiting, stored = set[int](), list(cell.results), set[str]()
    while waiting:
        name = waiting.pop()
        if name in given or name in cell.equal:
            continue
        if name not in makers:
            stored.add(name)
        elif makers[name] not in wanted:
            wanted.add(makers[name])
            waiting += nodes[makers[name]].input
    graph.node.extend(helper.make_node("Identity", [value], [name]) for name, value in cell.equal.items())
    graph.node.extend(node for k, node in enumerate(nodes) if k in wanted)
    graph.initializer.extend(tensor for own in around for tensor in own.initializer if tensor.name in stored)
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in given)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in cell.results)
    imports = [helper.make_opsetid("", opset_of(model)), *(o for o in model.opset_import if o.domain)]
    return helper.make_model(graph, opset_imports=imports, ir_version=max(model.ir_version, 4))


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _feeds(cell: Cell, scale: float, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Numbers for what enters a cell: of three rows where its shapes leave that open, else of as many as they say."""
    rng = np.random.default_rng(seed)
    for rows in (3, 1):
        shapes = {name: [rows if n is None else n for n in cell.axes[name]] + [n] for name, n in _given(cell).items()}
        yield {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}

"""A graph with compressed layers in the place of its recurrent nodes; all else is as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from htcompress.exporting.graph import IR_VERSION, Graph
from htcompress.exporting.recurrent import add_node
from htcompress.graphs.node import RecurrentNode
from htcompress.graphs.nodes import opset_of
from htcompress.nn.recurrent import HTRecurrent

LEAST_OPSET = 7
"""Before, recurrent operators were others."""


def replaced(
    model: onnx.ModelProto, nodes: Sequence[RecurrentNode], modules: Mapping[str, HTRecurrent]
) -> onnx.ModelProto:
    """A copy of the model in which the nodes that have a module are computed from its cores.

    Weights that nobody reads any more are dropped; other nodes, their order and their values stay.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, opset = made.graph, opset_of(model)
    taken = _names(model.graph)
    instead: dict[int, list[onnx.NodeProto]] = {}
    for node in nodes:
        if node.name in modules:
            instead[node.index], numbers = _instead(node, modules[node.name], opset, taken)
            graph.initializer.extend(numbers)
    every = [new for index, old in enumerate(model.graph.node) for new in instead.get(index, [old])]
    del graph.node[:]
    graph.node.extend(every)
    if instead:
        _drop_unread(model, made)
        made.ir_version = max(made.ir_version, min(IR_VERSION, 4))  # initializers that are no inputs
    return made


def _names(graph: onnx.GraphProto) -> set[str]:
    values = {o for node in graph.node for o in node.output} | {i.name for i in graph.initializer}
    return values | {i.name for i in graph.input} | {node.name for node in graph.node}


def _instead(
    node: RecurrentNode, module: HTRecurrent, opset: int, taken: set[str]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes and numbers of a compressed layer, with the inputs and outputs of the node."""
    graph = Graph(_free(f"{node.name}/", taken), opset, values=_free(f"ht{node.index}/", taken))

    def entering(value: str) -> str:
        if not value:
            return ""
        wide = graph.cast(value, "FLOAT") if node.half else value
        return graph.add("Transpose", wide, perm=[1, 0, 2]) if node.batch_first else wide

    found = add_node(
        graph,
        module,
        entering(node.x),
        [entering(name) for name in node.initial],
        lengths=node.lengths,
        reverse=node.reverse,
    )
    renamed: dict[str, str] = {}
    for place, (value, output) in enumerate(zip(found, node.outputs, strict=True)):
        if not output:
            continue
        own = value
        if node.batch_first:
            own = graph.add("Transpose", own, perm=[2, 0, 1, 3] if place == 0 else [1, 0, 2])
        own = graph.cast(own, "FLOAT16") if node.half else own
        renamed[own] = output
    for new in graph.nodes:
        for place, name in enumerate(new.output):
            new.output[place] = renamed.get(name, name)
    graph.drop_unread([output for output in node.outputs if output])
    return graph.nodes, graph.initializers


def _free(prefix: str, taken: set[str]) -> str:
    """The prefix, or one like it, that no name begins with."""
    while any(name.startswith(prefix) for name in taken):
        prefix = f"{prefix[:-1]}_/"
    return prefix


def _drop_unread(before: onnx.ModelProto, made: onnx.ModelProto) -> None:
    """Drop what only the replaced nodes have read: initializers, and the nodes that made their weights."""
    graph = made.graph
    was_read = _read(before.graph)
    while True:
        read = _read(graph)
        kept = [
            node
            for node in graph.node
            if any(o in read or o not in was_read for o in node.output if o) or not node.output
        ]
        stored = [i for i in graph.initializer if i.name in read or i.name not in was_read]
        if len(kept) == len(graph.node) and len(stored) == len(graph.initializer):
            break
        dropped = {i.name for i in graph.initializer} - {i.name for i in stored}
        # Old files list their weights among the inputs, too.
        inputs = [value for value in graph.input if value.name not in dropped]
        del graph.node[:], graph.initializer[:], graph.input[:]
        graph.node.extend(kept)
        graph.initializer.extend(stored)
        graph.input.extend(inputs)


def _read(graph: onnx.GraphProto) -> set[str]:
    """The values that somebody reads, in subgraphs too."""
    read = {value.name for value in graph.output}
    for node in graph.node:
        read.update(node.input)
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                read |= _read(inner)
    return read

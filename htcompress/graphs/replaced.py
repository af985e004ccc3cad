"""A graph with compressed layers in the place of its recurrent nodes; all else is as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from htcompress.exporting.graph import IR_VERSION, Graph
from htcompress.exporting.recurrent import add_node
from htcompress.graphs.branches import every_graph, graph_at
from htcompress.graphs.node import Place, RecurrentNode
from htcompress.graphs.nodes import opset_of
from htcompress.nn.recurrent import HTRecurrent

LEAST_OPSET = 7
"""Before, recurrent operators were others."""


def replaced(
    model: onnx.ModelProto, nodes: Sequence[RecurrentNode], modules: Mapping[str, HTRecurrent]
) -> onnx.ModelProto:
    """A copy of the model in which the nodes whose layer has a module are computed from its cores.

    Nodes of one layer read the same numbers. Weights that nobody reads any more are dropped; other nodes, their order
    and their values stay.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    taken = names_of(model.graph)
    by_place: dict[Place, dict[int, list[onnx.NodeProto]]] = {}
    for name, module in modules.items():
        callings = [one for node in nodes if node.layer == name for one in node.everywhere]
        # What the layer stores stands around all that read it, once; small constants stand in each branch.
        around = graph_at(made.graph, _shared(callings))
        prefix = _free(f"{name}/", taken)
        for place in dict.fromkeys(one.place for one in callings):
            here = sorted((one for one in callings if one.place == place), key=lambda one: one.index)
            new, numbers = _instead(here, module, opset_of(model), prefix, taken)
            by_place.setdefault(place, {}).update(new)
            there = {number.name for number in around.initializer}
            graph_at(made.graph, place).initializer.extend(n for n in numbers if not n.name.startswith(prefix))
            around.initializer.extend(n for n in numbers if n.name.startswith(prefix) and n.name not in there)
        taken.add(prefix)
    # Inner graphs first: those around them are copied when their nodes are set anew.
    for place in sorted(by_place, key=len, reverse=True):
        graph, instead = graph_at(made.graph, place), by_place[place]
        every = [new for index, old in enumerate(graph.node) for new in instead.get(index, [old])]
        del graph.node[:]
        graph.node.extend(every)
    if by_place:
        drop_unread(model, made)
        made.ir_version = max(made.ir_version, min(IR_VERSION, 4))  # initializers that are no inputs
    return made


def _shared(nodes: Sequence[RecurrentNode]) -> Place:
    """The innermost place that is around all of these."""
    places = [one.place for one in nodes]
    depth = next(
        (k for k, steps in enumerate(zip(*places, strict=False)) if len(set(steps)) > 1), min(map(len, places))
    )
    return places[0][:depth]


def names_of(graph: onnx.GraphProto) -> set[str]:
    """All names of a graph and those in its nodes: of values, initializers and nodes."""
    found: set[str] = set()
    for _, own in every_graph(graph):
        found |= {o for node in own.node for o in node.output} | {i.name for i in own.initializer}
        found |= {i.name for i in own.input} | {node.name for node in own.node}
    return found


def _instead(
    nodes: Sequence[RecurrentNode], module: HTRecurrent, opset: int, prefix: str, taken: set[str]
) -> tuple[dict[int, list[onnx.NodeProto]], list[onnx.TensorProto]]:
    """What computes a layer wherever it is called in one graph, by the index of the node that called it; its numbers.

    What depends on these alone is computed where the layer is called first.
    """
    values = _free(f"ht{nodes[0].index}/", taken)
    taken.add(values)
    graph = Graph(prefix, opset, values=values)
    parts = {node.index: _called(graph, node, module) for node in nodes}
    graph.drop_unread([output for node in nodes for output in node.outputs if output])
    kept = {id(new) for new in graph.nodes}
    return {index: [new for new in part if id(new) in kept] for index, part in parts.items()}, graph.initializers


def _called(graph: Graph, node: RecurrentNode, module: HTRecurrent) -> list[onnx.NodeProto]:
    """The nodes that one calling adds, with the inputs and outputs of the node."""
    start = len(graph.nodes)

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
    # Nobody else has read these: the operator's outputs, and what is made of them, are its own.
    for new in graph.nodes[start:]:
        for place, name in enumerate(new.output):
            new.output[place] = renamed.get(name, name)
    return graph.nodes[start:]


def _free(prefix: str, taken: set[str]) -> str:
    """The prefix, or one like it, that no name begins with."""
    while any(name.startswith(prefix) for name in taken):
        prefix = f"{prefix[:-1]}_/"
    return prefix


def drop_unread(before: onnx.ModelProto, made: onnx.ModelProto) -> None:
    """Drop what only the replaced nodes have read: initializers, and the nodes that made their weights."""
    was_read = _read(before.graph)
    while True:
        read = _read(made.graph)
        # Inner graphs come first: what is dropped of one is no longer read around it.
        dropped = [_dropped(graph, read, was_read) for _, graph in every_graph(made.graph)]
        if not any(dropped):
            break


def _dropped(graph: onnx.GraphProto, read: set[str], was_read: set[str]) -> bool:
    """Whether anything was dropped of one graph."""
    kept = [
        node for node in graph.node if any(o in read or o not in was_read for o in node.output if o) or not node.output
    ]
    stored = [i for i in graph.initializer if i.name in read or i.name not in was_read]
    if len(kept) == len(graph.node) and len(stored) == len(graph.initializer):
        return False
    dropped = {i.name for i in graph.initializer} - {i.name for i in stored}
    # Old files list their weights among the inputs, too.
    inputs = [value for value in graph.input if value.name not in dropped]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(kept)
    graph.initializer.extend(stored)
    graph.input.extend(inputs)
    return True


def _read(graph: onnx.GraphProto) -> set[str]:
    """The values that somebody reads, in inner graphs too."""
    read: set[str] = set()
    for _, own in every_graph(graph):
        read |= {value.name for value in own.output} | {name for node in own.node for name in node.input}
    return read

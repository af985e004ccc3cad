"""Graphs of ONNX that stand in nodes of others: what is in them, and how their values are seen from outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
from onnx import TensorProto, helper

from htcompress.graphs.node import Place, RecurrentNode


def inner_graphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The graphs that a node holds, by the names of its attributes."""
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            yield attribute.name, graph


def every_graph(graph: onnx.GraphProto, place: Place = ()) -> Iterator[tuple[Place, onnx.GraphProto]]:
    """A graph and all that stand in its nodes, inner ones first, with where they stand."""
    for node in graph.node:
        for branch, inner in inner_graphs(node):
            yield from every_graph(inner, (*place, (first_output(node), branch)))
    yield place, graph


def first_output(node: onnx.NodeProto) -> str:
    """By which a node with branches is known; empty where nobody could read what it gives."""
    return next((output for output in node.output if output), "")


def graph_at(graph: onnx.GraphProto, place: Place) -> onnx.GraphProto:
    """The graph at a place. Raises `KeyError` where there is none."""
    for output, branch in place:
        graph = dict(inner_graphs(_node(graph, output)))[branch]
    return graph


def _node(graph: onnx.GraphProto, output: str) -> onnx.NodeProto:
    found = next((node for node in graph.node if output in node.output), None)
    if found is None:
        raise KeyError(output)
    return found


def seen_from_outside(model: onnx.ModelProto, nodes: Sequence[RecurrentNode]) -> onnx.ModelProto:
    """The model, where what enters and leaves nodes in branches of If is a value of the outermost graph, too.

    Such a value bears the name that `RecurrentNode.seen` says. Of a branch that is not run it is a row of nothing.
    The other branches give that: onnxruntime asks both for as many values of the same types, not for the same shapes.
    """
    wanted: dict[str, tuple[Place, str, int]] = {}
    for node in nodes:
        if node.place:
            numbers = TensorProto.FLOAT16 if node.half else TensorProto.FLOAT
            for name in node.inner_values:
                wanted[node.seen(name)] = node.place, name, TensorProto.INT32 if name == node.lengths else numbers
    if not wanted:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for seen, (place, name, kind) in wanted.items():
        _carry_out(made.graph, place, name, seen, kind)
    return made


def _carry_out(graph: onnx.GraphProto, place: Place, name: str, seen: str, kind: int) -> None:
    """Give a value of a branch out of all nodes around it. A value may not bear the name of one around it."""
    graphs = [graph_at(graph, place[:depth]) for depth in range(len(place) + 1)]
    value = name
    for depth in range(len(place), 0, -1):
        around, (output, branch) = graphs[depth - 1], place[depth - 1]
        inner = f"{seen} ({depth})"
        node = _node(around, output)
        for other, graph_of in inner_graphs(node):
            if other == branch:
                # A branch may not give out what it has from around it.
                graph_of.node.append(helper.make_node("Identity", [value], [inner]))
            else:
                nothing = helper.make_tensor(inner, kind, [0], [])
                graph_of.node.append(helper.make_node("Constant", [], [inner], value=nothing))
            graph_of.output.append(helper.make_tensor_value_info(inner, kind, None))
        value = seen if depth == 1 else f"{seen} ({depth - 1}, out)"
        node.output.append(value)

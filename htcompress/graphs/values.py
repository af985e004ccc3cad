"""The values of an ONNX graph: who makes them, who reads them, their shapes, and which hold the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto

from htcompress.graphs.branches import every_graph, first_output, inner_graphs
from htcompress.graphs.node import Place
from htcompress.graphs.nodes import Constants, refusal
from htcompress.graphs.sizes import Sizes

Shape = tuple[int | str | None, ...]
"""Sizes of axes: numbers, names of those that are open, None where nothing is known."""

_SMALL = 1024
"""Numbers of an initializer that may be a shape or an index, which the inference of shapes reads."""

_DRAWN = ("RandomNormal", "RandomUniform", "Bernoulli", "Multinomial", "Dropout")
"""Operators that give something else each time, by what their names begin with."""


class Values:
    """The values of one graph of a model.

    Attributes:
        graph: it.
        place: where it stands.
        inputs: those of the outermost graph.
        constants: what does not depend on them.
        makers: of each value, the node that puts it out.
        places: of each value that a node puts out, the node's index.
        readers: of each value, the indices of nodes that read it; -1 stands for the graph's outputs and inner graphs.
        shapes, kinds: of values, as far as they are known: sizes of axes, and types of ONNX.
    """

    def __init__(
        self, graph: onnx.GraphProto, constants: Constants, inferred: Mapping[Place, onnx.GraphProto], inputs: set[str]
    ) -> None:
        """Of a graph with its constants; `inferred` are graphs with what is known of their values."""
        self.graph, self.constants, self.place, self.inputs = graph, constants, constants.place, inputs
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        self.places = {name: k for k, node in enumerate(self.graph.node) for name in node.output if name}
        self.readers: dict[str, set[int]] = {}
        for name, index in self._read():
            self.readers.setdefault(name, set()).add(index)
        self.shapes: dict[str, Shape] = {}
        self.kinds: dict[str, int] = {}
        around = [inferred[self.place[:depth]] for depth in range(len(self.place) + 1)]
        for tensor in graph.initializer:
            self.kinds[tensor.name], self.shapes[tensor.name] = tensor.data_type, tuple(tensor.dims)
        for value in (v for own in around for v in (*own.value_info, *own.input, *own.output)):
            kind = value.type.tensor_type
            self.kinds[value.name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[value.name] = tuple(
                    d.dim_value if d.dim_value > 0 else d.dim_param or None for d in kind.shape.dim
                )
        self._hide_beginnings()
        self._sizes = Sizes(self.makers, self.constants, self.shapes)
        self._first: dict[str, str] = {}
        self._find_equal()

    @classmethod
    def every(cls, model: onnx.ModelProto) -> Iterator[tuple[Values, str]]:
        """Of every graph of a model; and why what stands in it cannot be replaced, if so.

        Graphs whose nodes do not stand in the order in which they can be computed are left out, with those in them.
        """
        inferred = dict(every_graph(_inferred(model)))
        inputs = {value.name for value in model.graph.input} - {i.name for i in model.graph.initializer}

        def each(graph: onnx.GraphProto, constants: Constants, refused: str) -> Iterator[tuple[Values, str]]:
            if not _in_order(graph):
                return
            yield cls(graph, constants, inferred, inputs), refused
            for node in graph.node:
                for branch, inner in inner_graphs(node):
                    place = (*constants.place, (first_output(node), branch))
                    own = Constants(inner, constants.opset, place, constants)
                    yield from each(inner, own, refused or refusal(node, constants.opset))

        yield from each(model.graph, Constants.of(model), "")

    def _read(self) -> Iterator[tuple[str, int]]:
        for k, node in enumerate(self.graph.node):
            yield from ((name, k) for name in node.input if name)
            for _, inner in inner_graphs(node):
                for _, own in every_graph(inner):
                    yield from ((name, -1) for one in own.node for name in one.input if name)
                    yield from ((value.name, -1) for value in own.output)
        yield from ((value.name, -1) for value in self.graph.output)

    def _hide_beginnings(self) -> None:
        """Take a constant that a matrix multiplies, as the zeros that a sequence begins with, for a value."""
        for node in self.graph.node:
            if node.op_type in ("MatMul", "Gemm") and self.constants(node.input[1]) is not None:
                left = self.constants(node.input[0])
                if left is not None and left.ndim > 1 and (left.shape[-1] == left.size or np.ptp(left) == 0):
                    self.constants.hide(node.input[0])

    def _find_equal(self) -> None:
        """Of nodes that compute the same of the same, the first stands for all."""
        known: dict[tuple[object, ...], onnx.NodeProto] = {}
        for node in self.graph.node:
            if node.op_type.startswith(_DRAWN) or any(True for _ in inner_graphs(node)):
                continue
            if any(len(a.t.raw_data) > 4 * _SMALL for a in node.attribute):
                continue
            said = tuple(sorted(a.SerializeToString() for a in node.attribute))
            given = tuple(self._first.get(name, name) for name in node.input)
            first = known.setdefault((node.op_type, node.domain, given, said, len(node.output)), node)
            self._first.update(zip(node.output, first.output, strict=True))

    def equal_to(self, name: str) -> list[str]:
        """The values that other nodes compute, of the same as this one."""
        return [other for other, first in self._first.items() if first == name != other]

    def base(self, name: str) -> str:
        """The value of which this one has the rows, in the same order; of those that are equal the first."""
        node = self.makers.get(name)
        while node is not None and self._passes(node, name):
            name = node.input[0]
            node = self.makers.get(name)
        return self._first.get(name, name)

    def attribute(self, node: onnx.NodeProto, name: str, place: int, default: object = None) -> object:
        """What is said as an attribute in older opsets and as an input in later ones; the default if not at all."""
        for said in node.attribute:
            if said.name == name:
                return onnx.helper.get_attribute_value(said)
        if place and len(node.input) > place and node.input[place]:
            given = node.input[place]
            found = self.constants(given)
            found = self._sizes(given) if found is None else found
            return default if found is None else found.tolist()
        return default

    def width(self, name: str) -> int | None:
        """The size of the last axis."""
        shape = self.shapes.get(name)
        return shape[-1] if shape and isinstance(shape[-1], int) else None

    def axis(self, name: str, axis: int) -> int:
        """An axis of a value counted from the end: -1 is the last. Raises `KeyError` where it has none known."""
        return axis if axis < 0 else axis - len(self.shapes[name])

    def touches_nothing(self, node: onnx.NodeProto, axis: int) -> bool:
        """Whether the axis, counted from the end, is of size one in what the node is given, and not the last."""
        shape = self.shapes.get(node.input[0])
        return axis < -1 and shape is not None and -axis <= len(shape) and shape[axis] == 1

    def _passes(self, node: onnx.NodeProto, name: str) -> bool:
        """Whether a node gives the rows of its first input on, in their order."""
        if node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type in ("Identity", "Dropout"):
            return name == node.output[0] and len(node.input) < 3
        source = node.input[0] if node.input else ""
        if node.op_type == "Cast":
            return self.kinds.get(source) == self.kinds.get(name) is not None
        before, after = self.shapes.get(source), self.shapes.get(name)
        if not before or not after or not isinstance(before[-1], int) or before[-1] != after[-1]:
            return False
        if node.op_type in ("Squeeze", "Unsqueeze", "Reshape", "Flatten"):
            return True
        if node.op_type == "Transpose":
            order = self.attribute(node, "perm", 0) or list(range(len(before)))[::-1]
            kept = [k for k in order if before[k] != 1] if isinstance(order, list) else [-1]
            return kept == sorted(kept)
        if node.op_type in ("Concat", "Split"):
            return len(node.input if node.op_type == "Concat" else node.output) == 1
        if node.op_type == "Gather":
            axis = self.attribute(node, "axis", 0, 0)
            return isinstance(axis, int) and self.touches_nothing(node, self.axis(source, axis))
        if node.op_type == "Slice":
            axes = self.attribute(node, "axes", 3)
            own = axes if isinstance(axes, list) else range(len(before))
            return all(
                n == m and (n == 1 or k not in (own_axis % len(before) for own_axis in own))
                for k, (n, m) in enumerate(zip(before, after, strict=True))
            )
        return False


def _in_order(graph: onnx.GraphProto) -> bool:
    later = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if not later.isdisjoint(node.input):
            return False
        later -= set(node.output)
    return True


def _inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph with what is known of its values' shapes. Large numbers are left out of what is inferred from."""
    bare = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph = bare.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    given = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) <= _SMALL and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    try:
        return onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except Exception:  # whatever it stumbles over: then only what the file says is known
        return graph

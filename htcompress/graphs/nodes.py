"""The recurrent nodes of an ONNX graph, and what torch's modules make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from htcompress.graphs.branches import every_graph, first_output, inner_graphs
from htcompress.graphs.node import Place, RecurrentNode, same_weights, with_shared_layers
from htcompress.nn.activations import activation_of
from htcompress.nn.recurrence import RECURRENCES, Recurrence, recurrence_of, with_nonlinearity
from htcompress.nn.settings import RecurrentSettings
from htcompress.vocabulary import Kind

_OPERATORS = {recurrence.onnx.name for recurrence in RECURRENCES}
_QUANTISED = "DynamicQuantizeLSTM"
_KINDS = {"LSTM": Kind.LSTM, "GRU": Kind.GRU, "RNN": Kind.RNN_TANH}
_USUAL = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
"""The activations of a direction where an operator is told of none."""

_TAKEN = {
    "alpha": ("affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu"),
    "beta": ("affine", "scaledtanh", "hardsigmoid"),
}
"""The activations that take the next of an operator's lists of these."""

_BRANCHES = 11
"""The opset from which on branches may give values of unlike numbers of axes, as those do that are looked into."""

_LARGEST = 1 << 30
"""Numbers that are computed of constants, at most."""


class NotUnderstoodError(Exception):
    """A node does what no module of torch does; the text says what, as what follows the node's name."""


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators; 0 where none is used."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def find(model: onnx.ModelProto) -> tuple[list[RecurrentNode], dict[str, str]]:
    """The recurrent nodes that torch can stand in for; of the others the reason, by name."""
    graphs = dict(every_graph(model.graph))
    read = {name for graph in graphs.values() for node in graph.node for name in node.input}
    read |= {value.name for graph in graphs.values() for value in graph.output}
    found: list[RecurrentNode] = []
    left: dict[str, str] = {}
    taken: set[str] = set()

    def named(node: onnx.NodeProto) -> str:
        base = (node.name or first_output(node) or node.op_type).replace(".", "_").strip("/") or "node"
        name = next(n for n in candidates(base) if n not in taken)
        taken.add(name)
        return name

    def look(graph: onnx.GraphProto, constants: Constants, refused: str) -> None:
        for index, node in enumerate(graph.node):
            for branch, inner in inner_graphs(node):
                place = (*constants.place, (first_output(node), branch))
                look(
                    inner,
                    Constants(inner, constants.opset, place, constants),
                    refused or refusal(node, constants.opset),
                )
            if node.op_type not in _OPERATORS and node.op_type != _QUANTISED:
                continue
            name = named(node)
            try:
                if refused:
                    raise NotUnderstoodError(refused)
                found.append(_understood(node, name, index, constants, read))
            except NotUnderstoodError as error:
                left[name] = str(error)

    look(model.graph, Constants.of(model), "")
    return with_shared_layers(list(_brought_together(found))), left


def _brought_together(nodes: Sequence[RecurrentNode]) -> Iterator[RecurrentNode]:
    """Those in branches of which never two are run, with the same weights, as one."""
    rest = list(nodes)
    while rest:
        first, others = rest[0], rest[1:]
        group = [first]
        for other in others:
            if all(_alike(one, other) and are_apart(one.place, other.place) for one in group):
                group.append(other)
        yield replace(first, also=tuple(group[1:]))
        rest = [other for other in others if other not in group]


def _alike(one: RecurrentNode, other: RecurrentNode) -> bool:
    """Whether two nodes have the same weights and do the same with them."""
    told = [(n.reverse, bool(n.lengths), *map(bool, n.initial), *map(bool, n.outputs)) for n in (one, other)]
    return told[0] == told[1] and same_weights(one, other)


def are_apart(one: Place, other: Place) -> bool:
    """Whether two places are in different branches of one node."""
    pair = next(((a, b) for a, b in zip(one, other, strict=False) if a != b), None)
    return pair is not None and pair[0][0] == pair[1][0]


def refusal(node: onnx.NodeProto, opset: int) -> str:
    """Why recurrent nodes in the graphs of a node are left, if they are."""
    if node.op_type != "If" or node.domain not in ("", "ai.onnx"):
        return f"stands in a subgraph of {node.op_type}, where it is left alone"
    if opset < _BRANCHES:
        return (
            f"stands in a branch of an If of opset {opset}, where it is left alone; bring the model to {_BRANCHES} or "
            f"later with onnx.version_converter"
        )
    return "" if first_output(node) else "stands in a branch of an If whose results nobody reads"


def candidates(base: str) -> Iterator[str]:
    """A name, and others for where it is taken."""
    yield base
    count = 1
    while True:
        count += 1
        yield f"{base}_{count}"


class Constants:
    """What in a graph does not depend on its inputs: initializers, and what nodes compute of those alone.

    Attributes:
        opset: of the model.
        place: of the graph.
    """

    def __init__(self, graph: onnx.GraphProto, opset: int, place: Place = (), around: Constants | None = None) -> None:
        """Of a graph; `around` are those of the graph that it stands in, if any."""
        self.opset, self.place, self._around = opset, place, around
        self._known: dict[str, np.ndarray | None] = {"": None}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._inputs = {value.name for value in graph.input}
        self._sources: dict[str, frozenset[tuple[Place, str]]] = {}

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Constants:
        """Of the outermost graph of a model."""
        return cls(model.graph, opset_of(model))

    def __call__(self, name: str, depth: int = 0) -> np.ndarray | None:
        """The value; None where it is no constant."""
        if self._elsewhere(name):
            return None if self._around is None else self._around(name, depth)
        if name not in self._known:
            self._known[name] = None  # a graph that runs in a circle
            self._known[name] = self._computed(name, depth)
        return self._known[name]

    def hide(self, name: str) -> None:
        """Take a value for one that is not known; before what is computed of it is asked for."""
        self._known[name] = None

    def sources(self, name: str) -> frozenset[tuple[Place, str]]:
        """The numbers that a constant is made of: where they are stored, and their names."""
        if not name or self._elsewhere(name):
            return frozenset() if self._around is None else self._around.sources(name)
        if name not in self._sources:
            node = None if name in self._stored else self._makers.get(name)
            given = [] if node is None else list(node.input)
            self._sources[name] = frozenset() if given else frozenset([(self.place, name)])
            self._sources[name] = self._sources[name].union(*(self.sources(i) for i in given))
        return self._sources[name]

    def _elsewhere(self, name: str) -> bool:
        return bool(name) and name not in self._stored and name not in self._makers and name not in self._inputs

    def _computed(self, name: str, depth: int) -> np.ndarray | None:
        if name in self._stored:
            return numpy_helper.to_array(self._stored[name])
        node = self._makers.get(name)
        if node is None or depth > 32 or any(True for _ in inner_graphs(node)) or node.domain not in ("", "ai.onnx"):
            return None
        given = {i: self(i, depth + 1) for i in node.input if i}
        if any(value is None for value in given.values()):
            return None
        if sum(value.size for value in given.values() if value is not None) > _LARGEST:
            return None
        from onnx.reference import ReferenceEvaluator

        try:
            inputs = [onnx.ValueInfoProto(name=i) for i in given]
            body = onnx.helper.make_graph([node], "constant", inputs, [onnx.ValueInfoProto(name=name)])
            opset = onnx.helper.make_opsetid("", self.opset)
            evaluator = ReferenceEvaluator(onnx.helper.make_model(body, opset_imports=[opset]))
            found = next(iter(evaluator.run(None, given)))
        except Exception:  # whatever an operator stumbles over: then it is no constant that is known
            return None
        return found if isinstance(found, np.ndarray) else None


def _understood(node: onnx.NodeProto, name: str, index: int, constants: Constants, read: set[str]) -> RecurrentNode:
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    inputs = [*node.input, *[""] * (12 - len(node.input))]
    quantised = node.op_type == _QUANTISED
    kind, words = _computed(node, given)
    resets_before = recurrence_of(kind).has_reset and not given.get("linear_before_reset", 0)
    recurrence = recurrence_of(kind, words, resets_before=resets_before)
    if given.get("clip"):
        raise NotUnderstoodError("clips what enters its gates, which torch does not")
    if given.get("input_forget"):
        raise NotUnderstoodError("couples its input and forget gates, which torch does not")
    if recurrence.states > 1 and inputs[7]:
        raise NotUnderstoodError("has peepholes, which torch's LSTM has not")
    direction = _text(given.get("direction", "forward"))
    weight = partial(_quantised, constants, inputs) if quantised else partial(_plain, constants, inputs)
    w, r = weight(1), weight(2)
    directions, rows, columns = w.shape
    hidden = r.shape[2]
    if rows != recurrence.gates * hidden or r.shape != (directions, rows, hidden):
        raise NotUnderstoodError(f"has weights of shapes {w.shape} and {r.shape}, which do not fit each other")
    if directions != (2 if direction == "bidirectional" else 1):
        raise NotUnderstoodError(f"has weights for {directions} directions and is called {direction}")
    biases = constants(inputs[3])
    if inputs[3] and biases is None:
        raise NotUnderstoodError("has biases that are computed of the model's inputs")
    if biases is not None and biases.shape != (directions, 2 * rows):
        raise NotUnderstoodError(f"has biases of shape {biases.shape}; expected {(directions, 2 * rows)}")
    outputs = [o if o in read else "" for o in node.output]
    return RecurrentNode(
        name,
        index,
        RecurrentSettings(
            kind,
            columns,
            hidden,
            bias=biases is not None,
            bidirectional=direction == "bidirectional",
            activations=",".join(words),
            resets_before=resets_before,
        ),
        _weights(recurrence, w, r, biases),
        reverse=direction == "reverse",
        batch_first=bool(given.get("layout", 0)),
        half=w.dtype == np.float16,
        quantised=quantised,
        x=inputs[0],
        lengths=inputs[4],
        initial=tuple(inputs[5 : 5 + recurrence.states]) if any(inputs[5 : 5 + recurrence.states]) else (),
        outputs=(*outputs, *[""] * (1 + recurrence.states - len(outputs))),
        stored=frozenset[tuple[Place, str]]().union(*(constants.sources(given) for given in inputs[1:4])),
        place=constants.place,
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _computed(node: onnx.NodeProto, given: dict[str, Any]) -> tuple[Kind, tuple[str, ...]]:
    """The kind of recurrence, and the words of its activations where they are not torch's."""
    operator = "LSTM" if node.op_type == _QUANTISED else node.op_type
    usual = _USUAL[operator]
    said = [_text(a) for a in given.get("activations", [])] or [*usual]
    lists = {name: iter(given.get(f"activation_{name}", ())) for name in _TAKEN}
    found = []
    for name in said:
        alpha, beta = (next(lists[k], None) if name.lower() in _TAKEN[k] else None for k in ("alpha", "beta"))
        activation = activation_of(name, alpha, beta)
        if activation is None:
            told = ", ".join(str(round(value, 4)) for value in (alpha, beta) if value is not None)
            raise NotUnderstoodError(
                f"has the activation {name}{f' ({told})' if told else ''}, which is not known here"
            )
        found.append(activation.word)
    parts = {tuple(found[k : k + len(usual)]) for k in range(0, len(found), len(usual))}
    own = parts.pop()
    if parts or len(own) != len(usual):
        raise NotUnderstoodError(f"has other activations in each direction: {', '.join(said)}")
    if len(own) == 3 and own[1] != own[2]:
        raise NotUnderstoodError(f"has the activations {own[1]} of the candidate and {own[2]} of the cell, two in one")
    # What one operator computes is several kinds to torch, by its activation.
    other = with_nonlinearity(own[0]) if len(own) == 1 else None
    kind = _KINDS[operator] if other is None else other.kind
    adapted = recurrence_of(kind, own[:2])
    return kind, () if adapted.native else own[:2]


def _plain(constants: Constants, inputs: Sequence[str], k: int) -> np.ndarray:
    found = constants(inputs[k])
    if found is None:
        raise NotUnderstoodError("has weights that are computed of the model's inputs")
    if found.ndim != 3 or found.dtype not in (np.float16, np.float32, np.float64):
        raise NotUnderstoodError(f"has weights of shape {found.shape} in {found.dtype}")
    return found


def _quantised(constants: Constants, inputs: Sequence[str], k: int) -> np.ndarray:
    """The weights of a `DynamicQuantizeLSTM`: transposed, 8 bits, a scale for each direction or each column."""
    names = inputs[k], *inputs[8 + 2 * (k - 1) : 10 + 2 * (k - 1)]
    codes, scale, zero = (constants(name) for name in names)
    if codes is None or scale is None or zero is None or codes.ndim != 3:
        raise NotUnderstoodError("has quantised weights that are computed of the model's inputs")
    shape = (codes.shape[0], 1, -1)
    dense = (codes.astype(np.float32) - zero.astype(np.float32).reshape(shape)) * scale.reshape(shape)
    return np.ascontiguousarray(dense.transpose(0, 2, 1))


def _weights(recurrence: Recurrence, w: np.ndarray, r: np.ndarray, biases: np.ndarray | None) -> dict[str, Tensor]:
    """By torch's names, gates in torch's order."""
    gates, rows = recurrence.gates, w.shape[1]
    # The operator's gate k is torch's gate order[k].
    order = np.argsort(recurrence.onnx.gate_order)

    def turned(block: np.ndarray) -> Tensor:
        parted = block.reshape(gates, rows // gates, *block.shape[1:])[order].reshape(block.shape)
        return torch.from_numpy(np.array(parted, dtype=np.float32))

    found: dict[str, Tensor] = {}
    for direction, suffix in enumerate(["_l0", "_l0_reverse"][: len(w)]):
        found[f"weight_ih{suffix}"], found[f"weight_hh{suffix}"] = turned(w[direction]), turned(r[direction])
        if biases is not None:
            found[f"bias_ih{suffix}"] = turned(biases[direction, :rows])
            found[f"bias_hh{suffix}"] = turned(biases[direction, rows:])
    return found

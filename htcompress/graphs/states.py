"""Which output of a graph is the next state for which input, as its recurrent nodes say."""

from __future__ import annotations

import onnx

_PASSING = ("Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Cast")
"""Operators that give the numbers of their first input on."""

_RECURRENT = {"LSTM": 2, "GRU": 1, "RNN": 1, "DynamicQuantizeLSTM": 2}
"""Operators, and how many states they have."""

_INITIAL = 5
"""The place of the first initial state among the inputs of these."""


def states_of(model: onnx.ModelProto) -> dict[str, str]:
    """Inputs that a recurrent node begins with, and the outputs that hold what the same node ends with.

    Only nodes of the outermost graph say so, and only where nothing changes the numbers on the way.
    """
    makers = {name: node for node in model.graph.node for name in node.output if name}

    def origin(value: str) -> str:
        node = makers.get(value)
        while node is not None and node.op_type in _PASSING:
            value = node.input[0]
            node = makers.get(value)
        return value

    ends = {origin(output.name): output.name for output in reversed(model.graph.output)}
    inputs = {value.name for value in model.graph.input}
    found: dict[str, str] = {}
    for node in model.graph.node:
        for k in range(_RECURRENT.get(node.op_type, 0)):
            begin = origin(node.input[_INITIAL + k]) if len(node.input) > _INITIAL + k else ""
            end = ends.get(node.output[1 + k]) if len(node.output) > 1 + k and node.output[1 + k] else None
            if begin in inputs and end is not None:
                found.setdefault(begin, end)
    return found

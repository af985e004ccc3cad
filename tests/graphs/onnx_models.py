"""Small ONNX models with one recurrent node or several, written with onnx.helper."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
INPUTS, HIDDEN, BATCH, STEPS = 20, 12, 3, 7


def numbers(rng: np.random.Generator, *shape: int, scale: float = 0.4) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def node_model(
    op: str = "LSTM",
    *,
    opset: int = 17,
    direction: str = "forward",
    batch_first: bool = False,
    bias: bool = True,
    lengths: bool = False,
    initial: bool = False,
    outputs: tuple[bool, ...] = (True, True, True),
    half: bool = False,
    inputs: int = INPUTS,
    hidden: int = HIDDEN,
    seed: int = 0,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model that is one recurrent node: its inputs are X, and the lengths and the states that are asked for."""
    rng = np.random.default_rng(seed)
    directions = 2 if direction == "bidirectional" else 1
    rows = GATES[op] * hidden
    dtype = np.float16 if half else np.float32
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    stored = [
        numpy_helper.from_array(numbers(rng, directions, rows, inputs).astype(dtype), "W"),
        numpy_helper.from_array(numbers(rng, directions, rows, hidden).astype(dtype), "R"),
    ]
    names = ["X", "W", "R"]
    if bias:
        stored.append(numpy_helper.from_array(numbers(rng, directions, 2 * rows).astype(dtype), "B"))
    names.append("B" if bias else "")
    names.append("lengths" if lengths else "")
    states = 2 if op == "LSTM" else 1
    names += [f"{n}_0" if initial else "" for n in "hc"[:states]]
    while not names[-1]:
        names.pop()
    results = [n if kept else "" for n, kept in zip(("Y", "Y_h", "Y_c"), outputs, strict=True)][: 1 + states]
    if op == "GRU":
        attributes.setdefault("linear_before_reset", 1)
    if batch_first:
        attributes["layout"] = 1
    node = helper.make_node(op, names, results, name="layer", hidden_size=hidden, direction=direction, **attributes)
    x = ["batch", "time", inputs] if batch_first else ["time", "batch", inputs]
    state = ["batch", directions, hidden] if batch_first else [directions, "batch", hidden]
    y = ["batch", "time", directions, hidden] if batch_first else ["time", directions, "batch", hidden]
    given = [helper.make_tensor_value_info("X", kind, x)]
    if lengths:
        given.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]))
    if initial:
        given += [helper.make_tensor_value_info(f"{n}_0", kind, state) for n in "hc"[:states]]
    shapes = {"Y": y, "Y_h": state, "Y_c": state}
    out = [helper.make_tensor_value_info(name, kind, shapes[name]) for name in results if name]
    body = helper.make_graph([node], "one", given, out, stored)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def feed(model: onnx.ModelProto, seed: int = 5, batch: int = BATCH, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Arrays for the inputs of such a model."""
    rng = np.random.default_rng(seed)
    known = {"batch": batch, "time": steps}
    found = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or known[d.dim_param] for d in kind.shape.dim]
        if kind.elem_type == TensorProto.INT32:
            found[value.name] = (1 + np.arange(batch) * 3 % steps).astype(np.int32)
            found[value.name][-1] = steps
        else:
            dtype = np.float16 if kind.elem_type == TensorProto.FLOAT16 else np.float32
            found[value.name] = rng.standard_normal(shape).astype(dtype)
    return found


def tagger(opset: int = 17) -> onnx.ModelProto:
    """Frames (batch, time, 20) to scores (batch, time, 5): a product, a BiLSTM of 16, a GRU of 12, a product."""
    rng = np.random.default_rng(1)
    stored = {
        "first": numbers(rng, 20, 24, scale=0.3),
        "W1": numbers(rng, 2, 64, 24, scale=0.3),
        "R1": numbers(rng, 2, 64, 16, scale=0.3),
        "B1": numbers(rng, 2, 128, scale=0.1),
        "W2": numbers(rng, 1, 36, 32, scale=0.3),
        "R2": numbers(rng, 1, 36, 12, scale=0.3),
        "last": numbers(rng, 12, 5),
    }
    flat = numpy_helper.from_array(np.array([0, 0, -1], dtype=np.int64), "flat")
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["t", "first"], ["p"]),
        helper.make_node(
            "LSTM", ["p", "W1", "R1", "B1"], ["y1"], name="a.lstm", hidden_size=16, direction="bidirectional"
        ),
        helper.make_node("Transpose", ["y1"], ["y1t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["y1t", "flat"], ["y1f"]),
        helper.make_node("GRU", ["y1f", "W2", "R2"], ["y2"], hidden_size=12, linear_before_reset=1),
        helper.make_node("Transpose", ["y2"], ["y2t"], perm=[2, 0, 1, 3]),
        helper.make_node("Reshape", ["y2t", "flat"], ["y2f"]),
        helper.make_node("MatMul", ["y2f", "last"], ["scores"]),
    ]
    inputs, outputs = {"x": ["batch", "time", 20]}, {"scores": ["batch", "time", 5]}
    return made("tagger", nodes, inputs, outputs, stored, flat, opset=opset)


def streaming() -> onnx.ModelProto:
    """One frame a call, with its state in and out: (batch, 10), (1, batch, 12) to (batch, 3), (1, batch, 12)."""
    rng = np.random.default_rng(2)
    stored = {
        "W": numbers(rng, 1, 36, 10, scale=0.5),
        "R": numbers(rng, 1, 36, 12, scale=0.5),
        "B": numbers(rng, 1, 72, scale=0.1),
        "last": numbers(rng, 12, 3),
    }
    axis = numpy_helper.from_array(np.array([0], dtype=np.int64), "axis")
    nodes = [
        helper.make_node("Unsqueeze", ["frame", "axis"], ["x"]),
        helper.make_node(
            "GRU", ["x", "W", "R", "B", "", "state"], ["", "state_out"], hidden_size=12, linear_before_reset=1
        ),
        helper.make_node("Squeeze", ["state_out", "axis"], ["h"]),
        helper.make_node("MatMul", ["h", "last"], ["scores"]),
    ]
    inputs = {"frame": ["batch", 10], "state": [1, "batch", 12]}
    outputs = {"scores": ["batch", 3], "state_out": [1, "batch", 12]}
    return made("streaming", nodes, inputs, outputs, stored, axis)


def clips() -> onnx.ModelProto:
    """A clip a call, steps first, both states in one array: (steps, 10), (2, 1, 12) to (steps,), (2, 1, 12)."""
    rng = np.random.default_rng(3)
    stored = {
        "W": numbers(rng, 1, 48, 10, scale=0.5),
        "R": numbers(rng, 1, 48, 12, scale=0.5),
        "B": numbers(rng, 1, 96, scale=0.1),
        "last": numbers(rng, 12, 1),
    }
    whole = {"zero": [0], "one": [1], "two": [2], "flat": [-1]}
    stored_too = [numpy_helper.from_array(np.array(n, dtype=np.int64), name) for name, n in whole.items()]
    nodes = [
        helper.make_node("Unsqueeze", ["clip", "one"], ["x"]),
        helper.make_node("Slice", ["both", "zero", "one", "zero"], ["h"]),
        helper.make_node("Slice", ["both", "one", "two", "zero"], ["c"]),
        helper.make_node("LSTM", ["x", "W", "R", "B", "", "h", "c"], ["y", "hn", "cn"], hidden_size=12),
        helper.make_node("Concat", ["hn", "cn"], ["both_out"], axis=0),
        helper.make_node("MatMul", ["y", "last"], ["scores"]),
        helper.make_node("Sigmoid", ["scores"], ["likely"]),
        helper.make_node("Reshape", ["likely", "flat"], ["probability"]),
    ]
    inputs, outputs = {"clip": ["steps", 10], "both": [2, 1, 12]}, {"probability": ["steps"], "both_out": [2, 1, 12]}
    return made("clips", nodes, inputs, outputs, stored, *stored_too)


def made(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    stored: dict[str, np.ndarray],
    *others: onnx.TensorProto,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model of float32 inputs and outputs."""
    given, results = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in values.items()]
        for values in (inputs, outputs)
    )
    numbers_of = [numpy_helper.from_array(value, n) for n, value in stored.items()]
    body = helper.make_graph(nodes, name, given, results, [*numbers_of, *others])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)

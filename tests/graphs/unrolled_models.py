"""Small ONNX models with recurrent cells that are written out in MatMul, Add, Sigmoid and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INPUTS, HIDDEN = 7, 5


class Builder:
    """Nodes and numbers of a graph that is written down step by step."""

    def __init__(self, opset: int = 17, seed: int = 0) -> None:
        self.opset, self.nodes, self.stored = opset, list[onnx.NodeProto](), list[onnx.TensorProto]()
        self.rng = np.random.default_rng(seed)

    def add(self, op: str, *given: str, outputs: int = 1, to: str = "", **attributes: Any) -> Any:
        """One more node; what it puts out."""
        names = [to] if to else [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(given), names, **attributes))
        return names[0] if len(names) == 1 else names

    def number(self, value: Any, name: str = "", dtype: Any = np.float32) -> str:
        """A constant."""
        name = name or f"n{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def whole(self, *values: int) -> str:
        """A constant of whole numbers."""
        return self.number(values, dtype=np.int64)

    def matrix(self, *shape: int, name: str = "") -> str:
        """Weights that are drawn."""
        return self.number(self.rng.standard_normal(shape) * 0.5, name)

    def dense(self, x: str, inputs: int, outputs: int) -> str:
        """x W + b."""
        return self.add("Add", self.add("MatMul", x, self.matrix(inputs, outputs)), self.matrix(outputs))

    def split(self, value: str, count: int, axis: int = -1) -> list[str]:
        """Equal parts."""
        if self.opset >= 18:
            return self.add("Split", value, outputs=count, axis=axis, num_outputs=count)
        return self.add("Split", value, outputs=count, axis=axis)

    def lstm(self, i: str, f: str, g: str, o: str, c: str = "c", to: tuple[str, str] = ("h_new", "c_new")) -> None:
        """What follows the pre-activations."""
        kept = self.add("Mul", self.add("Sigmoid", f), c)
        entered = self.add("Mul", self.add("Tanh", g), self.add("Sigmoid", i))
        self.add("Add", entered, kept, to=to[1])
        self.add("Mul", self.add("Tanh", to[1]), self.add("Sigmoid", o), to=to[0])

    def model(self, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> onnx.ModelProto:
        """The graph."""
        given, found = (
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in values.items()]
            for values in (inputs, outputs)
        )
        body = helper.make_graph(self.nodes, "unrolled", given, found, self.stored)
        return helper.make_model(body, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


LSTM = {"x": ["batch", INPUTS], "h": ["batch", HIDDEN], "c": ["batch", HIDDEN]}
LSTM_OUT = {"h_new": ["batch", HIDDEN], "c_new": ["batch", HIDDEN]}
GRU, GRU_OUT = {n: LSTM[n] for n in "xh"}, {"h_new": ["batch", HIDDEN]}


def eight_gemms() -> onnx.ModelProto:
    """Two Gemms for each gate, matrices as torch has them."""
    b = Builder()

    def gate() -> str:
        w, r = b.matrix(HIDDEN, INPUTS), b.matrix(HIDDEN, HIDDEN)
        own = b.add("Gemm", "x", w, b.matrix(HIDDEN), transB=1)
        return b.add("Gemm", "h", r, own, transB=1, alpha=0.5)

    b.lstm(gate(), gate(), gate(), gate())
    return b.model(LSTM, LSTM_OUT)


def one_product(opset: int = 17) -> onnx.ModelProto:
    """[h, x] W, split into i, c, f, o, with a forget bias that is added: as TensorFlow's BasicLSTMCell."""
    b = Builder(opset)
    both = b.add("Concat", "h", "x", axis=1)
    i, g, f, o = b.split(b.dense(both, INPUTS + HIDDEN, 4 * HIDDEN), 4, axis=1)
    b.lstm(i, b.add("Add", f, b.number(1.0)), g, o)
    return b.model(LSTM, LSTM_OUT)


def keras() -> onnx.ModelProto:
    """Gates i, f, c, o by Slice, with x and the states under an axis for the step."""
    b = Builder(12)
    x = b.add("Squeeze", "x", axes=[1])
    h, c = (b.add("Squeeze", n, axes=[0]) for n in "hc")
    own = b.add("MatMul", x, b.matrix(INPUTS, 4 * HIDDEN))
    total = b.add("Add", b.add("Add", own, b.add("MatMul", h, b.matrix(HIDDEN, 4 * HIDDEN))), b.matrix(4 * HIDDEN))

    def gate(k: int) -> str:
        return b.add("Slice", total, b.whole(k * HIDDEN), b.whole((k + 1) * HIDDEN), b.whole(1))

    i, f, g, o = (gate(k) for k in range(4))
    b.lstm(i, f, g, o, c, ("h_own", "c_own"))
    for n in "hc":
        b.add("Unsqueeze", f"{n}_own", axes=[0], to=f"{n}_new")
    b.add("MatMul", "h_own", b.matrix(HIDDEN, 3), to="y")
    state = [1, 1, HIDDEN]
    return b.model({"x": [1, 1, INPUTS], "h": state, "c": state}, {"y": [1, 3], "h_new": state, "c_new": state})


def stacked_gates() -> onnx.ModelProto:
    """Gates (batch, 4, hidden), of which one Sigmoid makes three that are cut apart behind it."""
    b = Builder()
    both = b.add("Concat", "x", "h", axis=-1)
    gates = b.add("Reshape", b.dense(both, INPUTS + HIDDEN, 4 * HIDDEN), b.whole(-1, 4, HIDDEN))
    shut = b.add("Sigmoid", b.add("Slice", gates, b.whole(0), b.whole(3), b.whole(1)))
    one, two, three = (b.add("Gather", shut, b.number(k, dtype=np.int64), axis=1) for k in range(3))
    g = b.add("Tanh", b.add("Squeeze", b.add("Slice", gates, b.whole(3), b.whole(4), b.whole(1)), b.whole(1)))
    b.add("Add", b.add("Mul", "c", two), b.add("Mul", one, g), to="c_new")
    b.add("Mul", three, b.add("Tanh", "c_new"), to="h_new")
    return b.model(LSTM, LSTM_OUT)


def two_inputs() -> onnx.ModelProto:
    """What enters comes from two values, each with a matrix of its own; no biases; the states in one array."""
    b = Builder(13)
    h, c = b.split("state", 2, axis=0)
    h, c = (b.add("Squeeze", n, b.whole(0)) for n in (h, c))
    left, right = (b.add("MatMul", n, b.matrix(k, 4 * HIDDEN)) for n, k in (("x", INPUTS), ("z", HIDDEN)))
    total = b.add("Add", b.add("MatMul", h, b.matrix(HIDDEN, 4 * HIDDEN)), b.add("Add", left, right))
    o, f, g, i = b.split(total, 4)
    b.lstm(i, f, g, o, c, ("h_own", "c_own"))
    b.add("Concat", *(b.add("Unsqueeze", f"{n}_own", b.whole(0)) for n in "hc"), axis=0, to="state_new")
    state = [2, "batch", HIDDEN]
    inputs = {"x": ["batch", INPUTS], "z": ["batch", HIDDEN], "state": state}
    return b.model(inputs, {"h_own": ["batch", HIDDEN], "state_new": state})


def transposed() -> onnx.ModelProto:
    """Matrices that are transposed by nodes, and a product from the left side of Add; gates scaled by a constant."""
    b = Builder()
    w, r = (b.add("Transpose", b.matrix(4 * HIDDEN, n), perm=[1, 0]) for n in (INPUTS, HIDDEN))
    total = b.add("Sub", b.add("MatMul", "x", w), b.add("Neg", b.add("MatMul", "h", r)))
    total = b.add("Div", b.add("Mul", b.number(3.0), total), b.number(2.0))
    i, f, g, o = b.split(total, 4)
    b.lstm(i, f, g, o)
    return b.model(LSTM, LSTM_OUT)


def gru(form: str = "torch", *, reset_after: bool = True) -> onnx.ModelProto:
    """A GRU; `form` says how its state is mixed with the candidate."""
    b = Builder()
    count = 3 if reset_after else 2
    own, kept = b.dense("x", INPUTS, 3 * HIDDEN), b.dense("h", HIDDEN, count * HIDDEN)
    (r1, z1, n1), (r2, z2, *rest) = b.split(own, 3), b.split(kept, count)
    r, z = (b.add("Sigmoid", b.add("Add", *pair)) for pair in ((r1, r2), (z1, z2)))
    read = rest[0] if reset_after else "h"
    reset = b.add("Mul", r, read)
    reset = reset if reset_after else b.add("MatMul", reset, b.matrix(HIDDEN, HIDDEN))
    n = b.add("Tanh", b.add("Add", n1, reset))
    one, out = b.number(np.ones(1)), "h_new"
    if form == "torch":
        b.add("Add", b.add("Mul", b.add("Sub", "h", n), z), n, to=out)
    elif form == "one minus":
        b.add("Add", b.add("Mul", "h", z), b.add("Mul", b.add("Sub", one, z), n), to=out)
    elif form == "turned":
        b.add("Add", b.add("Mul", n, z), b.add("Mul", b.add("Add", b.add("Neg", z), one), "h"), to=out)
    else:
        b.add("Sub", "h", b.add("Mul", z, b.add("Sub", "h", n)), to=out)
    return b.model(GRU, GRU_OUT)


def gru_of_two_products() -> onnx.ModelProto:
    """Inputs and state beside each other: once for both gates, once with the state reset, as TensorFlow's GRUCell."""
    b = Builder()
    both = b.add("MatMul", b.add("Concat", "x", "h", axis=1), b.matrix(INPUTS + HIDDEN, 2 * HIDDEN))
    r, z = b.split(b.add("Sigmoid", b.add("Add", both, b.matrix(2 * HIDDEN))), 2)
    beside = b.add("Concat", "x", b.add("Mul", r, "h"), axis=1)
    n = b.add("Tanh", b.add("Add", b.add("MatMul", beside, b.matrix(INPUTS + HIDDEN, HIDDEN)), b.matrix(HIDDEN)))
    b.add("Add", b.add("Mul", z, "h"), b.add("Mul", b.add("Sub", b.number(1.0), z), n), to="h_new")
    return b.model(GRU, GRU_OUT)


def rnn(operator: str = "Tanh") -> onnx.ModelProto:
    """A plain RNN, with an output behind it."""
    b = Builder()
    total = b.add("Add", b.dense("x", INPUTS, HIDDEN), b.add("MatMul", "h", b.matrix(HIDDEN, HIDDEN)))
    b.add(operator, total, to="h_new")
    b.add("MatMul", "h_new", b.matrix(HIDDEN, 3), to="y")
    return b.model(GRU, {"y": ["batch", 3], **GRU_OUT})


def sequence(steps: int = 3, *, zeros: bool = False, read: bool = False) -> onnx.ModelProto:
    """Several steps of one LSTM, written out.

    Args:
        zeros: whether it begins with constants, one for h and one for c, and not with inputs.
        read: whether one of its matrices is read elsewhere.
    """
    b = Builder()
    w, r, bias = b.matrix(INPUTS, 4 * HIDDEN), b.matrix(HIDDEN, 4 * HIDDEN), b.matrix(4 * HIDDEN)
    begun = np.zeros((2, HIDDEN))
    h, c = (b.number(begun), b.number(begun)) if zeros else ("h", "c")
    for k in range(steps):
        x = b.add("Gather", "x", b.number(k, dtype=np.int64), axis=1)
        total = b.add("Add", b.add("Add", b.add("MatMul", x, w), b.add("MatMul", h, r)), bias)
        last = k == steps - 1
        own = ("h_new", "c_new") if last else (f"h{k}", f"c{k}")
        i, f, g, o = b.split(total, 4)
        b.lstm(i, f, g, o, c, own)
        h, c = own
    if read:
        b.add("MatMul", "h_new", r, to="again")
    given = {"x": [2 if zeros else "batch", steps, INPUTS]}
    return b.model(given if zeros else {**LSTM, **given}, {**LSTM_OUT, **({"again": ["batch", 20]} if read else {})})


def spoilt(how: str) -> onnx.ModelProto:
    """An LSTM of one step that is none, or of which something inside is read elsewhere."""
    b = Builder()
    total = b.add("Add", b.dense("x", INPUTS, 4 * HIDDEN), b.add("MatMul", "h", b.matrix(HIDDEN, 4 * HIDDEN)))
    if how == "normalised":
        total = b.add("LayerNormalization", total, b.number(np.ones(4 * HIDDEN)), axis=-1)
    i, f, g, o = b.split(total, 4)
    if how == "peepholes":
        i = b.add("Add", i, b.add("Mul", "c", b.matrix(HIDDEN)))
    outputs = dict(LSTM_OUT)
    if how == "read inside":
        b.add("Identity", i, to="gate")
        outputs["gate"] = ["batch", HIDDEN]
    if how == "hard":
        kept = b.add("Mul", b.add("HardSigmoid", f), "c")
        b.add("Add", kept, b.add("Mul", b.add("HardSigmoid", i), b.add("Tanh", g)), to="c_new")
        b.add("Mul", b.add("HardSigmoid", o), b.add("Tanh", "c_new"), to="h_new")
    else:
        b.lstm(i, f, g, o)
    return b.model(LSTM, outputs)


def two_layers() -> onnx.ModelProto:
    """Frames (batch, 20) through an LSTM of 16 and a GRU of 12 to scores (batch, 3); states in and out."""
    b = Builder(seed=3)
    both = b.add("Concat", "frame", "h", axis=-1)
    i, f, g, o = b.split(b.dense(both, 36, 64), 4)
    b.lstm(i, f, g, o)
    own, kept = b.dense("h_new", 16, 36), b.dense("s", 12, 36)
    (r1, z1, n1), (r2, z2, n2) = b.split(own, 3), b.split(kept, 3)
    r, z = (b.add("Sigmoid", b.add("Add", *pair)) for pair in ((r1, r2), (z1, z2)))
    n = b.add("Tanh", b.add("Add", n1, b.add("Mul", r, n2)))
    b.add("Add", b.add("Mul", b.add("Sub", "s", n), z), n, to="s_new")
    b.add("MatMul", "s_new", b.matrix(12, 3, name="last"), to="scores")
    states = {"h": ["batch", 16], "c": ["batch", 16], "s": ["batch", 12]}
    return b.model(
        {"frame": ["batch", 20], **states}, {"scores": ["batch", 3], **{f"{n}_new": s for n, s in states.items()}}
    )


SPELLINGS: dict[str, tuple[str, Callable[[], onnx.ModelProto]]] = {
    "two Gemms a gate": ("LSTM", eight_gemms),
    "one product": ("LSTM", one_product),
    "one product, opset 18": ("LSTM", lambda: one_product(18)),
    "Keras": ("LSTM", keras),
    "stacked gates": ("LSTM", stacked_gates),
    "two inputs": ("LSTM", two_inputs),
    "transposed": ("LSTM", transposed),
    "GRU": ("GRU", gru),
    "GRU, one minus": ("GRU", lambda: gru("one minus")),
    "GRU, turned": ("GRU", lambda: gru("turned")),
    "GRU, from the state": ("GRU", lambda: gru("from the state")),
    "GRU, reset before": ("GRU", lambda: gru(reset_after=False)),
    "GRU, reset before, turned": ("GRU", lambda: gru("turned", reset_after=False)),
    "GRU of two products": ("GRU", gru_of_two_products),
    "RNN": ("RNN", rnn),
    "RNN of Relu": ("RNN", lambda: rnn("Relu")),
}
"""How cells are written, and what they are."""

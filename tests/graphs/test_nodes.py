"""A recurrent node is what its twin of torch computes, with onnxruntime as the judge; what torch has not is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from crossing import crossed, some
from onnx import helper, numpy_helper
from onnx_models import feed, node_model, tagger

import htcompress
from htcompress.graphs.file import OnnxFile
from htcompress.graphs.nodes import find
from htcompress.graphs.passing import entering_of, outputs_of
from htcompress.graphs.replaced import replaced
from htcompress.graphs.twins import Twins

EVERY = [
    (op, {"direction": direction, "bias": bias, "lengths": lengths, "initial": initial})
    for op, direction, bias, lengths, initial in product(
        ("LSTM", "GRU", "RNN"), ("forward", "reverse", "bidirectional"), (False, True), (False, True), (False, True)
    )
]


def run(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


@pytest.mark.parametrize(("op", "options"), crossed(EVERY))
def test_the_twin_computes_the_same(op: str, options: dict[str, Any]) -> None:
    model = node_model(op, **options)
    (node,), left = find(model)
    assert not left
    given = feed(model)
    wanted = outputs_of(node, run(model, given))
    with torch.no_grad():
        found = Twins([node]).outputs("layer", entering_of(node, given))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(("op", "options"), crossed(EVERY, 1))
def test_a_replaced_node_computes_what_its_layer_does(op: str, options: dict[str, Any]) -> None:
    model = node_model(op, **options)
    (node,), _ = find(model)
    twins = Twins([node])
    made = htcompress.compress(twins, ratio=3, bits=8, layout="split" if options["bias"] else "auto")
    assert made.model is not None
    result = replaced(model, [node], made.modules)
    onnx.checker.check_model(result)
    given = feed(model)
    with torch.no_grad():
        wanted = made.model.outputs("layer", entering_of(node, given))
    found = outputs_of(node, run(result, given))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert not {"W", "R", "B"} & {i.name for i in result.graph.initializer}


@pytest.mark.parametrize("opset", some([7, 9, 11, 13, 14, 18, 21], 7, 11, 18))
@pytest.mark.parametrize(
    "form",
    some(
        [{"layout": "split"}, {"layout": "paired"}, {"format": "tt"}, {"format": "tr"}, {"format": "bt"}],
        {"layout": "split"},
        {"layout": "paired"},
    ),
    ids=str,
)
def test_every_opset(opset: int, form: dict[str, Any]) -> None:
    model = node_model("LSTM", opset=opset, direction="bidirectional", bias=True)
    (node,), _ = find(model)
    made = htcompress.compress(Twins([node]), ratio=1.5, bits=5, **form)
    assert made.model is not None
    result = replaced(model, [node], made.modules)
    assert [o.version for o in result.opset_import] == [opset]
    given = feed(model)
    with torch.no_grad():
        wanted = made.model.outputs("layer", entering_of(node, given))
    for a, b in zip(outputs_of(node, run(result, given)), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_batches_first_and_half_precision_are_turned_back() -> None:
    """onnxruntime runs neither: the reference evaluator does."""
    from onnx.reference import ReferenceEvaluator

    for options in ({"batch_first": True, "outputs": (True, True, False)}, {"half": True}):
        model = node_model("LSTM", **options)  # type: ignore[arg-type]
        (node,), _ = find(model)
        assert node.batch_first == ("batch_first" in options)
        made = htcompress.compress(Twins([node]), budget=100_000, layout="svd")
        assert made.model is not None
        result = replaced(model, [node], made.modules)
        given = feed(model)
        names = [o.name for o in model.graph.output]
        with torch.no_grad():
            wanted = made.model.outputs("layer", entering_of(node, given))
        if options.get("half"):
            onnx.checker.check_model(result, full_check=True)
            continue
        values = dict(zip(names, ReferenceEvaluator(result).run(names, given), strict=True))
        for a, b in zip(outputs_of(node, values), wanted, strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, atol=1e-4)


ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "reset before the matrix": ("GRU", {"linear_before_reset": 0}),
    "reset before, backwards": ("GRU", {"linear_before_reset": 0, "direction": "reverse", "initial": True}),
    "reset before, lengths": ("GRU", {"linear_before_reset": 0, "direction": "bidirectional", "lengths": True}),
    "reset before, no bias": ("GRU", {"linear_before_reset": 0, "bias": False}),
    "hard sigmoid": ("LSTM", {"activations": ["HardSigmoid", "Tanh", "Tanh"]}),
    "hard sigmoid of Keras 3": (
        "LSTM",
        {"activations": ["hardsigmoid", "Tanh", "tanh"], "activation_alpha": [1 / 6], "activation_beta": [0.5]},
    ),
    "both directions": (
        "LSTM",
        {
            "activations": ["HardSigmoid", "Softsign", "Softsign"] * 2,
            "activation_alpha": [0.2] * 2,
            "direction": "bidirectional",
            "lengths": True,
        },
    ),
    "relu in an LSTM": ("LSTM", {"activations": ["Sigmoid", "Relu", "Relu"], "initial": True}),
    "GRU of hard sigmoid": ("GRU", {"activations": ["HardSigmoid", "Tanh"]}),
    "all at once": ("GRU", {"activations": ["HardSigmoid", "Elu"], "linear_before_reset": 0}),
    "softplus": ("GRU", {"activations": ["Sigmoid", "Softplus"]}),
    "an RNN of softsign": ("RNN", {"activations": ["Softsign"]}),
    "an RNN of no activation": (
        "RNN",
        {"activations": ["Affine"], "activation_alpha": [1.0], "activation_beta": [0.0]},
    ),
}
"""What torch has no module for."""


@pytest.mark.parametrize("case", ADAPTED)
def test_what_torch_has_not_is_computed_step_by_step(case: str) -> None:
    """The node, the module that stands for it, the compressed one, and the node that is written of that."""
    op, options = ADAPTED[case]
    model = node_model(op, **options)
    (node,), left = find(model)
    assert not left
    given = feed(model)
    twins = Twins([node])
    with torch.no_grad():
        found = twins.outputs("layer", entering_of(node, given))
    for a, b in zip(found, outputs_of(node, run(model, given)), strict=True):
        assert torch.allclose(a, b, atol=2e-6)
    for goal, tolerance in (({"ratio": 3, "bits": 8}, 1e-5), ({"error": 1e-6}, 2e-5)):
        made = htcompress.compress(twins, **goal)
        assert made.model is not None
        result = replaced(model, [node], made.modules)
        onnx.checker.check_model(result)
        with torch.no_grad():
            compressed = made.model.outputs("layer", entering_of(node, given))
        for a, b in zip(compressed, outputs_of(node, run(result, given)), strict=True):
            assert torch.allclose(a, b, atol=tolerance)
    for a, b in zip(compressed, found, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


REFUSED = {
    "clip": (node_model("LSTM", clip=3.0), "clips what enters"),
    "coupled gates": (node_model("LSTM", input_forget=1), "couples its input and forget gates"),
    "an activation": (node_model("RNN", activations=["ScaledTanh"]), "the activation ScaledTanh, which is not known"),
    "another slope": (
        node_model("LSTM", activations=["HardSigmoid", "Tanh", "Tanh"], activation_alpha=[0.3]),
        "the activation HardSigmoid (0.3)",
    ),
    "two of one": (
        node_model("LSTM", activations=["Sigmoid", "Tanh", "Relu"]),
        "tanh of the candidate and relu of the cell",
    ),
    "each its own": (
        node_model("RNN", activations=["Tanh", "Relu"], direction="bidirectional"),
        "other activations in each direction: Tanh, Relu",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_has_not_is_named(case: str) -> None:
    model, said = REFUSED[case]
    nodes, left = find(model)
    assert not nodes
    assert said in left["layer"]


def test_relu() -> None:
    (node,), _ = find(node_model("RNN", direction="bidirectional", activations=["Relu", "relu"]))
    assert node.settings.kind.value == "rnn_relu"


def test_weights_that_nodes_make_of_constants() -> None:
    model = node_model("LSTM")
    before = find(model)[0][0].weights
    w = next(i for i in model.graph.initializer if i.name == "W")
    turned = np.ascontiguousarray(numpy_helper.to_array(w).transpose(2, 1, 0))
    model.graph.initializer.remove(w)
    constant = helper.make_node("Constant", [], ["wt"], value=numpy_helper.from_array(turned))
    nodes = [constant, helper.make_node("Transpose", ["wt"], ["W"], perm=[2, 1, 0]), *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (node,), left = find(model)
    assert not left
    assert node.weights.keys() == before.keys()
    assert all(torch.equal(node.weights[name], value) for name, value in before.items())
    made = htcompress.compress(Twins([node]), ratio=3)
    result = replaced(model, [node], made.modules)
    assert not {"wt", "W"} & {o for n in result.graph.node for o in n.output}


def test_weights_of_the_models_inputs_are_refused() -> None:
    model = node_model("LSTM")
    w = next(i for i in model.graph.initializer if i.name == "W")
    model.graph.initializer.remove(w)
    model.graph.input.append(helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, list(w.dims)))
    nodes, left = find(model)
    assert not nodes
    assert "computed of the model's inputs" in left["layer"]


def test_integer_weights_of_onnxruntime() -> None:
    """A node of `DynamicQuantizeLSTM` is read with its scales."""
    model = node_model("LSTM", direction="bidirectional")
    weights = find(model)[0][0].weights
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    quantised: dict[str, np.ndarray] = {"B": stored["B"]}
    for name in "WR":
        dense = stored[name].transpose(0, 2, 1)
        # Seven bits: without VNNI a processor adds two products of eight in 16 bits, which overflow.
        scale = np.abs(dense).max((1, 2)) / 63
        quantised[name] = np.round(dense / scale[:, None, None]).astype(np.int8)
        quantised[f"{name}s"], quantised[f"{name}z"] = scale.astype(np.float32), np.zeros(2, np.int8)
    node = helper.make_node(
        "DynamicQuantizeLSTM",
        ["X", "W", "R", "B", "", "", "", "", "Ws", "Wz", "Rs", "Rz"],
        ["Y", "Y_h", "Y_c"],
        name="layer",
        domain="com.microsoft",
        hidden_size=12,
        direction="bidirectional",
    )
    arrays = [numpy_helper.from_array(value, name) for name, value in quantised.items()]
    body = helper.make_graph([node], "one", list(model.graph.input), list(model.graph.output), arrays)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(body, opset_imports=imports, ir_version=8)
    (found,), left = find(made)
    assert not left
    assert found.quantised
    for name, value in weights.items():
        assert torch.allclose(found.weights[name], value, atol=2e-2)
    given = feed(made)
    wanted = outputs_of(found, run(made, given))
    with torch.no_grad():
        own = Twins([found]).outputs("layer", entering_of(found, given))
    for a, b in zip(own, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.03


def test_names_are_apart_and_have_no_dots() -> None:
    nodes, _ = find(tagger())
    assert [node.name for node in nodes] == ["a_lstm", "y2"]
    assert [node.outputs for node in nodes] == [("y1", "", ""), ("y2", "")]


def test_weights_are_counted_as_the_file_holds_them(tmp_path: Path) -> None:
    model = node_model("LSTM", half=True)
    dense = sum(value.numel() for value in find(model)[0][0].weights.values())
    onnx.save(model, tmp_path / "half.onnx")
    assert OnnxFile.read(tmp_path / "half.onnx").layer_sizes() == (dense, 2 * dense)

    model = node_model("LSTM")
    node = model.graph.node[0]
    again = helper.make_node("LSTM", list(node.input), ["", "again"], name="again", hidden_size=12)
    model.graph.node.append(again)
    model.graph.output.append(helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "twice.onnx")
    file = OnnxFile.read(tmp_path / "twice.onnx")
    assert len(file.nodes) == 2
    assert file.layer_sizes() == file.layer_sizes([file.nodes[1].layer]) == (dense, 4 * dense)
    assert file.numbers() == dense

"""Nodes of a graph that have the same weights: one layer computes them all, and is stored once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import numbers
from small import Outcome

import htcompress
from htcompress.graphs.file import OnnxFile
from htcompress.graphs.nodes import find
from htcompress.graphs.replaced import replaced
from htcompress.graphs.twins import Entering, Twins
from htcompress.report import read_report

Command = Callable[..., Outcome]

INPUTS, HIDDEN = 20, 12


def twofold() -> onnx.ModelProto:
    """x (time, batch, 20) to y (time, batch, 5): an LSTM of 12 reads it from its beginning, and again from its end."""
    rng = np.random.default_rng(0)
    stored = {"W": numbers(rng, 1, 48, INPUTS), "R": numbers(rng, 1, 48, HIDDEN), "B": numbers(rng, 1, 96)}
    stored |= {"last": numbers(rng, 2 * HIDDEN, 5), "zero": np.array([0]), "one": np.array([1])}
    nodes = [
        helper.make_node("LSTM", ["x", "W", "R", "B"], ["there_y"], "there", hidden_size=HIDDEN),
        helper.make_node("Relu", ["x"], ["bent"]),
        helper.make_node(
            "LSTM", ["bent", "W", "R", "B"], ["back_y", "back_h"], "back", hidden_size=HIDDEN, direction="reverse"
        ),
        helper.make_node("Concat", ["there_y", "back_y"], ["both"], axis=3),
        helper.make_node("Squeeze", ["both", "one"], ["flat"]),
        helper.make_node("MatMul", ["flat", "last"], ["y"]),
        helper.make_node("Squeeze", ["back_h", "zero"], ["h"]),
    ]
    body = helper.make_graph(
        nodes,
        "twofold",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["time", "batch", INPUTS])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["time", "batch", 5]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", HIDDEN]),
        ],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def test_one_layer_computes_both() -> None:
    model = twofold()
    nodes, left = find(model)
    assert left == {}
    assert [(node.name, node.layer) for node in nodes] == [("there", "there"), ("back", "there")]
    twins = Twins(nodes)
    assert [name for name, _ in twins.named_children()] == ["there"]
    made = htcompress.compress(twins, ratio=3, bits=8)
    assert made.model is not None
    result = replaced(model, nodes, made.modules)
    onnx.checker.check_model(result)
    x = np.random.default_rng(1).standard_normal((7, 3, INPUTS)).astype(np.float32)
    entering = {"there": Entering(torch.from_numpy(x)), "back": Entering(torch.from_numpy(x).relu())}
    with torch.no_grad():
        answers = made.model(entering)
    y, h = run(result, x)
    both = torch.cat([answers["there"][0], answers["back"][0]], -1)[:, 0]
    last = torch.from_numpy(numpy_helper.to_array(model.graph.initializer[3]).copy())
    assert torch.allclose(torch.from_numpy(y), both @ last, atol=1e-5)
    assert torch.allclose(torch.from_numpy(h), answers["back"][1][0], atol=1e-5)
    # What depends on the cores alone is there once.
    operators = [node.op_type for node in result.graph.node]
    assert operators.count("LSTM") == 2
    once = replaced(model, nodes[:1], made.modules)
    assert len(result.graph.node) - len(once.graph.node) <= 1
    assert {i.name for i in result.graph.initializer} <= {i.name for i in once.graph.initializer}


def test_of_those_that_are_left_the_next_has_the_layer(tmp_path: Path) -> None:
    onnx.save(twofold(), tmp_path / "model.onnx")
    file = OnnxFile.read(tmp_path / "model.onnx").without({"there": "is not wanted"})
    assert [(node.name, node.layer) for node in file.nodes] == [("back", "back")]


def test_convert(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(twofold(), "model.onnx")
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((32, 9, 4)).cumsum(1) @ rng.standard_normal((4, INPUTS)) / 3).astype(np.float32)
    np.savez("x.npz", x=x[:, :, None])
    options = ("--budget", "900", "--calibration", "x.npz", "--layout", "svd", "--steps", "8", "-o", "out")
    ended = htc("convert", "model.onnx", *options)
    assert ended.code == 0, ended.err
    assert "there also has the weights of back: one layer stands for all" in ended.err
    report = read_report(tmp_path / "out")
    assert [layer.name for layer in report.layers] == ["there"]
    dense = 48 * (INPUTS + HIDDEN + 2)
    assert report.totals.parameters_before == dense
    assert report.totals.parameters_after <= 900
    assert report.totals.model_parameters_before == dense + 2 * HIDDEN * 5
    assert report.totals.model_parameters_after == report.totals.parameters_after + 2 * HIDDEN * 5
    # What is measured is what is written, on the samples that are kept apart.
    own = x[-8:].transpose(1, 0, 2)
    wanted, found = (run(onnx.load(name), own) for name in ("model.onnx", "out/model.onnx"))
    errors = [
        np.sqrt(np.square(b - a).sum() / np.square(a - a.mean()).sum()) for a, b in zip(wanted, found, strict=True)
    ]
    assert np.mean(errors) == pytest.approx(report.quality.finetuned, rel=1e-3)
    assert 0 < np.mean(errors) < 0.9
    stored = onnx.load("out/model.onnx").graph.initializer
    weights = sum(int(np.prod(i.dims)) for i in stored if i.data_type == TensorProto.FLOAT)
    assert weights == report.totals.model_parameters_after
    inspected = htc("inspect", "model.onnx").out
    assert "1 recurrent layer, 1,632 of 1,752 parameters" in inspected

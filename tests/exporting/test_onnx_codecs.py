"""Cores that are stored in few bits stay so in an ONNX file, and are decoded to the very same numbers."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from crossing import crossed, some
from onnx import TensorProto, helper
from torch import nn

import htcompress
from htcompress.exporting.codecs import stored
from htcompress.exporting.graph import IR_VERSION, Graph
from htcompress.exporting.layer import layer_model
from htcompress.storage.half import Half
from htcompress.storage.integer import Integer
from htcompress.vocabulary import INTEGER_BITS


def run(graph: Graph, value: str, shape: tuple[int, ...]) -> Any:
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)
    nodes = [*graph.nodes, helper.make_node("Identity", [value], ["out"])]
    body = helper.make_graph(nodes, "numbers", [], [out], graph.initializers)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


@pytest.mark.parametrize("opset", some([7, 9, 11, 13, 18, 21], 7, 18))
@pytest.mark.parametrize("shape", some([(3, 5), (1,), (64, 3, 2), (7, 8)], (3, 5), (64, 3, 2)))
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("bits", some(INTEGER_BITS, 2, 3, 8))
def test_numbers_are_those_of_the_codec(bits: int, by_rows: bool, shape: tuple[int, ...], opset: int) -> None:
    core = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    codec = Integer(bits, by_rows)
    scales = codec.scales(core)
    graph = Graph("layer/", opset)
    value = stored(graph, core, "core", codec, scales)
    assert (run(graph, value, shape) == codec.rounded(core, scales).numpy()).all()
    assert stored(graph, core, "core", codec, scales) == value
    numbers = next(i for i in graph.initializers if i.name == "layer/core")
    assert codec.bytes(shape, core.dtype) - 2 * len(scales) <= len(numbers.raw_data) < core.numel() * bits / 8 + bits


def test_half_precision() -> None:
    core = torch.randn(5, 3)
    graph = Graph("")
    value = stored(graph, core, "core", Half(), None)
    assert (run(graph, value, (5, 3)) == core.half().float().numpy()).all()
    assert graph.initializers[0].data_type == TensorProto.FLOAT16


LAYERS: dict[str, nn.Module] = {
    "LSTM": nn.LSTM(40, 24, bidirectional=True),
    "GRU": nn.GRU(40, 24, num_layers=2),
    "RNN": nn.RNN(40, 24, bias=False),
}


@pytest.mark.parametrize(
    ("name", "options"),
    crossed(
        [
            (name, {"bits": bits, "scope": scope, "layout": layout})
            for name in LAYERS
            for bits in (16, 8, 5, 3)
            for scope in ("integrated", "separate")
            for layout in ("svd", "split", "paired")
        ],
        1,
    ),
)
def test_a_layer(name: str, options: dict[str, Any]) -> None:
    module = LAYERS[name]
    made = htcompress.compress(module, ratio=5, **options)
    # It is held against torch in there.
    model, error = layer_model(made.modules[""], "")
    assert error < 1e-5
    stored_bytes = made.report.totals.bytes_after
    graph = onnx.load_from_string(model).graph
    whole = (TensorProto.INT64, TensorProto.INT32)  # shapes, and the order of the units
    numbers = sum(len(i.raw_data) for i in graph.initializer if i.data_type not in whole)
    # Codes are filled up to the end of a group.
    cores = sum(1 for i in graph.initializer if i.data_type == TensorProto.UINT8)
    order = sum(4 * gates.order.numel() for gates in made.modules[""].directions().values() if gates.order is not None)
    assert stored_bytes - order <= numbers <= stored_bytes - order + 8 * cores + 8

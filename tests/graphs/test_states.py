"""States go from output to input as the nodes say, whatever the names say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_models import clips, node_model, numbers

from htcompress.graphs.calibration import Calibration
from htcompress.graphs.file import OnnxFile
from htcompress.graphs.measuring import feeds_for
from htcompress.graphs.states import states_of


def misnamed() -> onnx.ModelProto:
    """An LSTM whose cell state comes first, and whose outputs' names would have it the other way."""
    rng = np.random.default_rng(0)
    stored = {"W": numbers(rng, 1, 48, 20), "R": numbers(rng, 1, 48, 12), "zero": np.array([0], np.int64)}
    nodes = [
        helper.make_node("Unsqueeze", ["c", "zero"], ["c1"]),
        helper.make_node("Unsqueeze", ["h", "zero"], ["h1"]),
        helper.make_node("LSTM", ["x", "W", "R", "", "", "h1", "c1"], ["", "h2", "c2"], hidden_size=12),
        helper.make_node("Squeeze", ["h2", "zero"], ["hidden_cache"]),
        helper.make_node("Squeeze", ["c2", "zero"], ["h_long"]),
    ]
    given = [("x", ["time", "batch", 20]), ("c", ["batch", 12]), ("h", ["batch", 12])]
    found = [("hidden_cache", ["batch", 12]), ("h_long", ["batch", 12])]
    inputs, outputs = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in values] for values in (given, found)
    )
    body = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in stored.items()])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_nodes_say() -> None:
    assert states_of(misnamed()) == {"c": "h_long", "h": "hidden_cache"}
    assert states_of(node_model("GRU", initial=True)) == {"h_0": "Y_h"}
    assert states_of(node_model("LSTM", initial=True, outputs=(True, False, True))) == {"c_0": "Y_c"}
    assert states_of(node_model("LSTM")) == {}
    # What is cut out of another array is not said.
    assert states_of(clips()) == {}


def test_data_follow_the_nodes(tmp_path: Path) -> None:
    onnx.save(misnamed(), str(tmp_path / "model.onnx"))
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 3, 5, 1, 20), np.float32))
    session = OnnxFile.read(tmp_path / "model.onnx").session()
    feeds = feeds_for(session, Calibration(tmp_path / "x.npz"))
    assert dict(feeds.states) == {"c": "h_long", "h": "hidden_cache"}
    calls = next(feeds.sequences())
    answers = session.answers(calls, feeds.states)
    assert np.array_equal(answers[1]["c"], answers[0]["h_long"])
    assert np.array_equal(answers[1]["h"], answers[0]["hidden_cache"])

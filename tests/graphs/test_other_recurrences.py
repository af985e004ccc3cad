"""Files whose layers torch has no modules for, through the command line: converted, fine-tuned, written, exported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from keras_files import Array, arrays_of, hard_sigmoid, layer, legacy, model, named, run
from onnx_models import node_model
from small import Outcome

from htcompress.report import read_report
from htcompress.sources.keras_file import KerasFile

os.environ["KERAS_BACKEND"] = "torch"

Command = Callable[..., Outcome]


def smooth(count: int, steps: int, width: int) -> Array:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((count, steps, 3)).cumsum(1) @ rng.standard_normal((3, width)) / 3).astype(np.float32)


def relative(found: Array, wanted: Array) -> float:
    return float(np.sqrt(np.square(found - wanted).sum() / np.square(wanted - wanted.mean()).sum()))


def test_onnx(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = node_model(
        "GRU", linear_before_reset=0, activations=["HardSigmoid", "Tanh"], outputs=(True, False, False), hidden=24
    )
    onnx.save(made, "gru.onnx")
    width = made.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    x = smooth(16, 7, width)[:, :, None]
    np.savez("x.npz", X=x)
    ended = htc("convert", "gru.onnx", "--ratio", "4", "--calibration", "x.npz", "--steps", "80", "-o", "out")
    assert ended.code == 0, ended.err
    quality = read_report(tmp_path / "out").quality
    assert quality.finetuned is not None
    assert quality.finetuned <= quality.decomposed

    def answers(place: str) -> Array:
        session = onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"])
        return np.stack([session.run(None, {"X": sample})[0] for sample in x[-4:]])

    (node,) = (n for n in onnx.load("out/model.onnx").graph.node if n.op_type == "GRU")
    told = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert told["activations"] == [b"HardSigmoid", b"Tanh"]
    assert told.get("linear_before_reset", 0) == 0
    assert relative(answers("out/model.onnx"), answers("gru.onnx")) == pytest.approx(quality.finetuned, rel=1e-3)
    # The layer alone, as a graph of its own.
    assert htc("export", "out", "layer.onnx", "--to", "onnx").code == 0
    assert [n.op_type for n in onnx.load("layer.onnx").graph.node].count("GRU") == 1
    ended = htc("export", "out", "dense.pt", "--to", "dense")
    assert ended.code == 0
    assert "layer has the activations hard_sigmoid and tanh and a reset gate before" in " ".join(ended.out.split())
    ended = htc("export", "out", "c", "--to", "c")
    assert ended.code == 2
    assert "the activations hard_sigmoid and tanh and a reset gate before the matrix, which is not written" in ended.err


def test_keras(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of Keras 2: what is reported is what its own equations give with the weights that are written."""
    pytest.importorskip("keras")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    hard = {"return_sequences": True, "recurrent_activation": "hard_sigmoid"}
    weights = {
        "rec": arrays_of("LSTM", rng, 6, 16),
        "old": arrays_of("GRU", rng, 16, 12, reset_after=False),
    }
    config = model(
        layer("LSTM", "rec", units=16, **hard, batch_input_shape=[None, None, 6]), layer("GRU", "old", units=12, **hard)
    )
    legacy(tmp_path / "m.h5", {name: named(name, arrays) for name, arrays in weights.items()}, config)
    x = smooth(16, 7, 6)
    np.savez("x.npz", rec_input=x)
    found = json.loads(htc("inspect", "m.h5", "--json").out)
    assert [layer["settings"].get("activations") for layer in found["layers"]] == ["hard_sigmoid,tanh"] * 2
    assert [layer["settings"].get("resets_before", False) for layer in found["layers"]] == [False, True]
    ended = htc("convert", "m.h5", "--ratio", "3", "--calibration", "x.npz", "--steps", "80", "-o", "out")
    assert ended.code == 0, ended.err
    quality = read_report(tmp_path / "out").quality
    assert quality.finetuned is not None

    def answers(arrays: dict[str, list[Array]]) -> Array:
        return run("GRU", arrays["old"], run("LSTM", arrays["rec"], x[-4:], gate=hard_sigmoid), gate=hard_sigmoid)

    file, tensors = KerasFile.read(tmp_path / "out" / "model.h5"), {}
    for one in file.layers:
        ((layout, _),) = one.directions
        own = {part: file.tensors()[key].numpy() for part, key in one.keys(0).items()}
        tensors[one.name] = layout.from_torch(own)
    assert relative(answers(tensors), answers(weights)) == pytest.approx(quality.finetuned, rel=1e-3)
    assert htc("export", "out", "back.h5", "--to", "keras").code == 0
    assert (tmp_path / "back.h5").read_bytes() == (tmp_path / "out" / "model.h5").read_bytes()
    ended = htc("convert", "m.h5", "--ratio", "3", "-o", "alone")
    assert ended.code == 0
    assert read_report(tmp_path / "alone").totals.parameters_after < 1000
    # With a model of torch's their weights would be read as those of torch's layers.
    (tmp_path / "task.py").write_text("from torch import nn\n\n\ndef model():\n    return nn.GRU(16, 12)\n")
    ended = htc("convert", "m.h5", "--ratio", "3", "--task", "task.py", "-o", "torchs")
    assert ended.code == 2
    assert "without --task it is compressed" in " ".join(ended.err.split())

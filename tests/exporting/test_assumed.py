"""What weights alone do not tell is asked for, or said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import Listener
from torch import nn

import htcompress
from htcompress.errors import RequestError
from htcompress.exporting.verify import session
from htcompress.request import Goal


def converted(folder: Path, module: nn.Module, *, budget: int = 10**6) -> Path:
    """The output directory of a state_dict, made without a task."""
    torch.save({f"rnn.{name}": tensor for name, tensor in module.state_dict().items()}, folder / "model.pt")
    htcompress.save(htcompress.convert(folder / "model.pt", goal=Goal(budget=budget)), folder / "out")
    return folder / "out"


def without_note(out: Path) -> None:
    """As earlier versions wrote it."""
    config = json.loads((out / "config.json").read_text())
    for layer in config["layers"].values():
        layer.pop("assumed", None)
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_an_rnn_computes_what_it_is_said_to(tmp_path: Path, nonlinearity: str, earlier: bool) -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(10, 8, 2, nonlinearity=nonlinearity)
    out = converted(tmp_path, rnn)
    if earlier:
        without_note(out)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RequestError, match=r"rnn computes tanh or relu cannot be told.*--nonlinearity relu"):
        htcompress.export(out, tmp_path / "rnn.onnx", to="onnx")
    assert sorted(tmp_path.iterdir()) == before
    htcompress.export(out, tmp_path / "rnn.onnx", to="onnx", nonlinearity=nonlinearity)
    x, h = torch.randn(5, 3, 10), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected, last = rnn(x, h)
    found = session((tmp_path / "rnn.onnx").read_bytes()).run(None, {"input": x.numpy(), "h_0": h.numpy()})
    assert float(np.abs(found[0] - expected.numpy()).max()) < 1e-5
    assert float(np.abs(found[1] - last.numpy()).max()) < 1e-5


def test_an_rnn_that_was_seen_is_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    htcompress.save(htcompress.compress(nn.RNN(10, 8, nonlinearity="relu"), budget=10**6), tmp_path / "out")
    htcompress.export(tmp_path / "out", tmp_path / "rnn.onnx", to="onnx")
    htcompress.export(tmp_path / "out", tmp_path / "rnn.onnx", to="onnx", nonlinearity="relu")
    with pytest.raises(RequestError, match=r"known to compute relu.*leave it out"):
        htcompress.export(tmp_path / "out", tmp_path / "rnn.onnx", to="onnx", nonlinearity="tanh")


def test_the_layout_that_is_assumed_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(10, 8, batch_first=True)
    told, seen = Listener(), Listener()
    htcompress.export(converted(tmp_path, lstm), tmp_path / "lstm.onnx", to="onnx", observer=told)
    (said,) = told.messages
    assert "batch_first: rnn reads (time, batch, features), torch's default" in said
    htcompress.save(htcompress.compress(lstm, budget=10**6), tmp_path / "known")
    htcompress.export(tmp_path / "known", tmp_path / "lstm.onnx", to="onnx", observer=seen)
    assert seen.messages == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "dense", "nonlinearity": "relu"}, "without --task"),
        ({"to": "onnx", "task": "task.py", "nonlinearity": "relu"}, "without --task"),
        ({"to": "onnx", "nonlinearity": "gelu"}, "tanh or relu; found 'gelu'"),
        ({"to": "onnx", "nonlinearity": "relu"}, r"is for RNNs; .*another kind \(lstm\)"),
    ],
)
def test_what_is_said_has_to_fit(tmp_path: Path, options: dict[str, str], words: str) -> None:
    out = converted(tmp_path, nn.LSTM(10, 8))
    with pytest.raises(RequestError, match=words):
        htcompress.export(out, tmp_path / "model.onnx", **options)

"""Whole models as ONNX: what is around the layers by torch's exporter, the layers by their own nodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from crossing import some
from safetensors.torch import load_file, save_file
from small import Listener, Tagger, write_task

import htcompress
from htcompress.errors import HTCompressError, RequestError, TaskError
from htcompress.exporting.verify import session
from htcompress.report import read_report
from htcompress.task import load_task

HEAD = """\
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def model():
    return Model()


def calibration():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield inputs(generator)


def inputs(generator):
    return torch.randn(4, 6, 10, generator=generator)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.build()
        self.head = nn.Linear(8, 3)

"""

MODELS = {
    "both directions": """
    def build(self):
        self.rnn = nn.GRU(10, 4, 2, bidirectional=True, batch_first=True)

    def forward(self, x):
        out, last = self.rnn(x)
        return self.head(out), last
""",
    "an RNN": """
    def build(self):
        self.rnn = nn.RNN(10, 8, nonlinearity="relu")

    def forward(self, x):
        return self.head(self.rnn(x.transpose(0, 1))[0].mean(0))
""",
    "two layers that follow": """
    def build(self):
        self.first, self.second = nn.LSTM(10, 12, batch_first=True), nn.LSTM(12, 8, batch_first=True)

    def forward(self, x):
        middle, _ = self.first(x)
        out, (h, c) = self.second(middle.relu())
        return self.head(out[:, -1]), h, c
""",
    "one layer twice": """
    def build(self):
        self.into, self.rnn = nn.Linear(10, 8), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        out, state = self.rnn(self.into(x))
        return self.head(self.rnn(out.flip(1), state)[0])
""",
    "a cell": """
    def build(self):
        self.cell = nn.LSTMCell(10, 8)

    def forward(self, x):
        h, c = self.cell(x[:, 0])
        h, c = self.cell(x[:, -1], (h, c))
        return self.head(h)
""",
    "a dictionary": """
    def build(self):
        self.embedding, self.rnn = nn.Embedding(20, 10), nn.LSTM(10, 8, batch_first=True)

    def forward(self, batch):
        out, _ = self.rnn(self.embedding(batch["words"]) + batch["context"][:, None])
        return {"scores": self.head(out)}


def inputs(generator):
    return {
        "words": torch.randint(20, (4, 6), generator=generator), "context": torch.randn(4, 10, generator=generator)
    }
""",
    "a state that comes in": """
    def build(self):
        self.rnn = nn.LSTM(10, 8)

    def forward(self, x, h, c):
        out, state = self.rnn(x, (h, c))
        return self.head(out), state


def inputs(generator):
    x, h, c = torch.randn(6, 3, 10), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    return x, h, c
""",
    "a convolution before it": """
    def build(self):
        self.conv, self.rnn = nn.Conv1d(10, 8, 3), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.head(self.rnn(self.conv(x.transpose(1, 2)).transpose(1, 2))[0]), None
""",
    "a batch of one": """
    def build(self):
        self.rnn = nn.LSTM(10, 8, batch_first=True)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def inputs(generator):
    return torch.randn(1, 6, 10, generator=generator)
""",
}


NAMED = """
    def build(self):
        self.rnn = nn.LSTM(20, 8, batch_first=True)

    def forward(self, first, second, scale=None):
        x = torch.cat([first, second], -1)
        return self.head(self.rnn(x if scale is None else x * scale)[0])


def inputs(generator):
    return {name: torch.randn(4, 6, 10, generator=generator) for name in ("second", "first")}
"""
MODELS["named arguments"] = NAMED
MODELS["an input that is not read"] = MODELS["a dictionary"].replace(' + batch["context"][:, None]', "")


def converted(folder: Path, text: str) -> tuple[Path, Path]:
    """The task and the output directory of a model in it."""
    task = folder / "task.py"
    task.write_text(HEAD + text)
    torch.manual_seed(0)
    result = htcompress.compress(load_task(task).model(), budget=300, layout="split")
    htcompress.save(result, folder / "out")
    return task, folder / "out"


KEPT = "both directions", "two layers that follow", "a state that comes in", "a cell", "named arguments"


@pytest.mark.parametrize("name", some(MODELS, *KEPT))
def test_models(tmp_path: Path, name: str) -> None:
    task, out = converted(tmp_path, MODELS[name])
    done = htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    assert done.error is not None
    assert done.error < 1e-5
    made = onnx.load(tmp_path / "model.onnx")
    assert [entry.domain for entry in made.opset_import] == [""]
    found = Counter(node.op_type for node in made.graph.node)
    assert sum(found[op] for op in ("LSTM", "GRU", "RNN")) >= 1
    assert not set(found) & {"Loop", "Scan", "Recurrent"}


def test_other_batches_and_lengths(tmp_path: Path) -> None:
    task, out = converted(tmp_path, MODELS["both directions"])
    htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    compact = htcompress.load(out, load_task(task).model()).eval()
    runtime = session((tmp_path / "model.onnx").read_bytes())
    (given,) = runtime.get_inputs()
    assert [isinstance(size, str) for size in given.shape] == [True, True, False]
    for batch, steps in ((1, 1), (1, 13), (9, 2), (2, 31)):
        x = torch.randn(batch, steps, 10)
        with torch.no_grad():
            expected = compact(x)
        for a, b in zip(runtime.run(None, {given.name: x.numpy()}), expected, strict=True):
            assert float(np.abs(a - b.numpy()).max()) < 1e-5


def test_named_arguments_are_named_inputs(tmp_path: Path) -> None:
    task, out = converted(tmp_path, NAMED)
    htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    compact = htcompress.load(out, load_task(task).model()).eval()
    runtime = session((tmp_path / "model.onnx").read_bytes())
    given = {name: torch.randn(3, 5, 10) for name in ("first", "second")}
    assert [entry.name for entry in runtime.get_inputs()] == list(given)
    (found,) = runtime.run(None, {name: x.numpy() for name, x in given.items()})
    with torch.no_grad():
        assert float(np.abs(found - compact(**given).numpy()).max()) < 1e-5


def test_a_loop_over_the_steps_fixes_their_number(tmp_path: Path) -> None:
    loop = "h, c = self.cell(x[:, 0])\n        for t in x.unbind(1):\n            h, c = self.cell(t, (h, c))"
    task, out = converted(tmp_path, MODELS["a cell"].replace("h, c = self.cell(x[:, 0])", loop))
    htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    (given,) = session((tmp_path / "model.onnx").read_bytes()).get_inputs()
    assert isinstance(given.shape[0], str)
    assert given.shape[1:] == [6, 10]


@pytest.mark.full
def test_a_length_too_short_for_the_model_fixes_none(tmp_path: Path) -> None:
    task, out = converted(tmp_path, MODELS["a convolution before it"])
    htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    (given,) = session((tmp_path / "model.onnx").read_bytes()).get_inputs()
    assert [isinstance(size, str) for size in given.shape] == [True, True, False]


REFUSED = {
    "packed": (
        MODELS["a batch of one"].replace(
            "self.head(self.rnn(x)[0])",
            "self.head(pad_packed_sequence(self.rnn(pack_padded_sequence(x, [6], True))[0], True)[0])",
        ),
        ("packed sequences", "without --task and with --lengths"),
    ),
    "projection": (MODELS["a batch of one"].replace("10, 8", "10, 9, proj_size=8"), ("proj_size=8", "--to dense")),
    "by name alone": (
        NAMED.replace("first, second, scale=None", "first, scale=None, *, second"),
        ("gives forward() second by name alone", "yield tuples"),
    ),
    "text": (
        MODELS["a batch of one"].replace("return torch.randn(1, 6, 10, generator=generator)", "return ['a', 'b']"),
        ("yields a str", "without --task"),
    ),
    "nothing to go in": (MODELS["a cell"] + "\n\ndef calibration():\n    return iter(())\n", ("yields nothing",)),
    "branches on values": (
        MODELS["a batch of one"].replace(
            "return self.head", "if x.sum() > 0:\n            x = -x\n        return self.head"
        ),
        ("torch cannot export", "without --task"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_said_is_refused(tmp_path: Path, name: str) -> None:
    text, words = REFUSED[name]
    task, out = converted(tmp_path, text)
    with pytest.raises((RequestError, TaskError)) as error:
        htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "model.onnx").exists()


def test_layers_alone(tmp_path: Path) -> None:
    _, out = converted(tmp_path, MODELS["two layers that follow"])
    done = htcompress.export(out, tmp_path / "model.onnx", to="onnx")
    assert [path.name for path in done.files] == ["model.first.onnx", "model.second.onnx"]
    assert all(path.is_file() for path in done.files)


def test_reordered_units_are_named(tmp_path: Path) -> None:
    _, out = converted(tmp_path, MODELS["two layers that follow"])
    report = read_report(out)
    layers = (replace(report.layers[0], units_reordered=True), report.layers[1])
    (out / "report.json").write_text(replace(report, layers=layers).to_json())
    listener = Listener()
    htcompress.export(out, tmp_path / "model.onnx", to="onnx", observer=listener)
    assert len(listener.messages) == 1
    assert listener.messages[0].startswith("The hidden units of first stand in another order")


@pytest.mark.full
def test_half_precision_is_exported_in_single(tmp_path: Path) -> None:
    half = MODELS["both directions"] + "\n\ndef inputs(generator):\n    return torch.randn(4, 6, 10).half()\n"
    task, out = converted(tmp_path, half)
    tensors = {name: tensor.half() for name, tensor in load_file(out / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors")
    done = htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task)
    assert done.error is not None
    assert done.error < 1e-5


def test_a_task_without_a_model(tmp_path: Path) -> None:
    write_task(tmp_path / "task.py", "del calibration\n")
    htcompress.save(htcompress.compress(Tagger(), budget=400), tmp_path / "out")
    with pytest.raises(HTCompressError, match="calibration"):
        htcompress.export(tmp_path / "out", tmp_path / "model.onnx", to="onnx", task=tmp_path / "task.py")


STREAMS = """
    def build(self):
        self.first, self.second = nn.LSTM(10, 12, 2, batch_first=True), nn.GRU(12, 8, batch_first=True)

    def forward(self, x):
        return self.head(self.second(self.first(x)[0].relu())[0])
"""


def test_states_on_demand(tmp_path: Path) -> None:
    """Calls in a row, states passed on, give what one call on the whole sequence does; batch and time stay open."""
    task, out = converted(tmp_path, STREAMS)
    done = htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task, states=True)
    assert done.error is not None
    assert done.error < 1e-5
    assert done.fixed == ()
    runtime = session((tmp_path / "model.onnx").read_bytes())
    given = {i.name: i.shape for i in runtime.get_inputs()}
    states = ["first.h_0", "first.c_0", "second.h_0"]
    assert list(given) == ["x", *states]
    assert [given[name][0::2] for name in states] == [[2, 12], [2, 12], [1, 8]]
    results = [o.name for o in runtime.get_outputs()]
    assert results[1:] == ["first.h_n", "first.c_n", "second.h_n"]
    compact = htcompress.load(out, load_task(task).model()).eval()
    x = torch.randn(3, 11, 10)
    with torch.no_grad():
        wanted = compact(x).numpy()
    feed = {name: np.zeros((given[name][0], 3, given[name][2]), np.float32) for name in states}
    parts = []
    for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
        y, *last = runtime.run(None, {"x": part.numpy(), **feed})
        feed = dict(zip(states, last, strict=True))
        parts.append(y)
    assert float(np.abs(np.concatenate(parts, 1) - wanted).max()) < 1e-5


@pytest.mark.full
def test_states_of_a_batch_of_one_leave_the_sizes_open(tmp_path: Path) -> None:
    one = STREAMS + "\n\ndef inputs(generator):\n    return torch.randn(1, 6, 10, generator=generator)\n"
    task, out = converted(tmp_path, one)
    assert htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task, states=True).fixed == ()
    for given in session((tmp_path / "model.onnx").read_bytes()).get_inputs():
        assert isinstance(given.shape[0 if given.name == "x" else 1], str)


@pytest.mark.full
def test_arguments_that_hold_several_inputs_give_them_no_names(tmp_path: Path) -> None:
    text = """
    def build(self):
        self.rnn = nn.LSTM(10, 8, batch_first=True)

    def forward(self, batch, scale=None):
        return self.head(self.rnn(batch["x"] * batch["weight"])[0])


def inputs(generator):
    return ({"x": torch.randn(4, 6, 10, generator=generator), "weight": torch.ones(4, 6, 1)},)
"""
    task, out = converted(tmp_path, text)
    htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task, states=True)
    names = [given.name for given in session((tmp_path / "model.onnx").read_bytes()).get_inputs()]
    assert names == ["input_0", "input_1", "rnn.h_0", "rnn.c_0"]


def test_layers_that_stayed_dense_keep_their_states(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(HEAD + STREAMS)
    htcompress.save(htcompress.compress(load_task(task).model(), budget=300, layers="first"), tmp_path / "out")
    with pytest.raises(RequestError, match="Layer second was left dense, and its state is its own"):
        htcompress.export(tmp_path / "out", tmp_path / "model.onnx", to="onnx", task=task, states=True)


WITHOUT_STATES = {
    "both directions": "Layer rnn reads from the end, too",
    "a state that comes in": "is given its state by the model itself",
    "a cell": "runs cells, whose states it passes on itself",
    "one layer twice": "is given its state by the model itself",
    "one layer on two halves": "Layer rnn runs 2 times in a call",
}
MODELS_OF_STATES = MODELS | {
    "one layer on two halves": """
    def build(self):
        self.rnn = nn.LSTM(10, 8, batch_first=True)

    def forward(self, x):
        return self.head(self.rnn(x[:, :3])[0]), self.head(self.rnn(x[:, 3:])[0])
"""
}


@pytest.mark.parametrize("name", WITHOUT_STATES)
def test_states_that_are_not_the_callers(tmp_path: Path, name: str) -> None:
    task, out = converted(tmp_path, MODELS_OF_STATES[name])
    with pytest.raises(RequestError, match=WITHOUT_STATES[name]):
        htcompress.export(out, tmp_path / "model.onnx", to="onnx", task=task, states=True)
    with pytest.raises(RequestError, match="--states is for whole models"):
        htcompress.export(out, tmp_path / "model.onnx", to="onnx", states=True)
    assert not (tmp_path / "model.onnx").exists()

"""Cells that an exporter has unrolled are found, stand as nodes, and are compressed; the others are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import node_model, streaming, tagger
from small import Outcome
from torch import Tensor, nn
from unrolled_models import HIDDEN, INPUTS, LSTM, LSTM_OUT, SPELLINGS, Builder, sequence, spoilt, two_layers

import htcompress
from htcompress.graphs.file import OnnxFile
from htcompress.graphs.twins import Twins
from htcompress.graphs.unrolled import rerolled, rolled
from htcompress.report import read_report

Command = Callable[..., Outcome]


def drawn(model: onnx.ModelProto, seed: int = 1, batch: int = 3) -> dict[str, np.ndarray]:
    """Numbers for the inputs of a model."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: [d.dim_value or batch for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def answers(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, given))


def assert_same_answers(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    for seed in (1, 2):
        given = drawn(model, seed)
        for a, b in zip(answers(model, given), answers(other, given), strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() < 1e-5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    operator, build = SPELLINGS[spelling]
    model = build()
    onnx.checker.check_model(model)
    cells, left = rolled(model)
    assert left == {}
    assert [cell.operator for cell in cells] == [operator]
    made = rerolled(model, cells)
    onnx.checker.check_model(made)
    ops = [node.op_type for node in made.graph.node]
    assert ops.count(operator) == 1
    assert not {"Sigmoid", "Tanh", "Split", "Gemm"} & (set(ops) - ({"Split"} if spelling == "two inputs" else set()))
    assert list(made.graph.input) == list(model.graph.input)
    assert list(made.graph.output) == list(model.graph.output)
    assert_same_answers(model, made)
    # The old matrices are gone; there are as many numbers as before, beside biases.
    assert sum(w.size for n, w in cells[0].weights.items() if n != "B") == cells[0].numbers


class Cells(nn.Module):
    """An LSTM cell, a GRU cell and an RNN cell behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.LSTMCell(6, 5), nn.GRUCell(5, 4), nn.RNNCell(4, 4)

    def forward(self, x: Tensor, h: Tensor, c: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        h, c = self.first(x, (h, c))
        s = self.second(h, s)
        t = self.third(s, t)
        return t.sum(1), h, c, s, t


def exported(path: Path) -> tuple[Cells, onnx.ModelProto]:
    torch.manual_seed(0)
    module = Cells().eval()
    given = tuple(torch.randn(2, n) for n in (6, 5, 5, 4, 4))
    names = ["y", "h_n", "c_n", "s_n", "t_n"]
    torch.onnx.export(
        module,
        given,
        str(path),
        dynamo=False,
        input_names=list("xhcst"),
        output_names=names,
        dynamic_axes={n: {0: "batch"} for n in ["x", "h", "c", "s", "t", *names]},
    )
    return module, onnx.load(str(path))


@pytest.mark.filterwarnings("ignore")
def test_what_torch_exports(tmp_path: Path) -> None:
    """The nodes have the weights of the modules that were exported."""
    module, model = exported(tmp_path / "cells.onnx")
    file = OnnxFile.read(tmp_path / "cells.onnx")
    assert file.left == {}
    assert [node.name for node in file.nodes] == ["first", "second", "third"]
    assert_same_answers(model, file.model)
    for node, cell in zip(file.nodes, (module.first, module.second, module.third), strict=True):
        for part in ("weight_ih", "weight_hh"):
            assert torch.equal(node.weights[f"{part}_l0"], getattr(cell, part))
    # States go to the inputs that the nodes say.
    assert file.session().passed == {"h": "h_n", "c": "c_n", "s": "s_n", "t": "t_n"}


class Chunked(nn.Module):
    """A GRU's step written by hand; its exporter computes where `chunk` cuts, for the batch is open."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        own = self.rnn
        i, z, n = nn.functional.linear(x, own.weight_ih_l0, own.bias_ih_l0).chunk(3, -1)
        j, y, m = nn.functional.linear(h, own.weight_hh_l0, own.bias_hh_l0).chunk(3, -1)
        r, u = torch.sigmoid(i + j), torch.sigmoid(z + y)
        return (1 - u) * torch.tanh(n + r * m) + u * h


@pytest.mark.filterwarnings("ignore")
def test_cuts_that_follow_from_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Chunked().eval()
    torch.onnx.export(
        module,
        (torch.randn(2, 6), torch.randn(2, 5)),
        str(tmp_path / "chunked.onnx"),
        dynamo=False,
        input_names=["x", "h"],
        output_names=["h_n"],
        dynamic_axes={name: {0: "batch"} for name in ("x", "h", "h_n")},
    )
    model = onnx.load(str(tmp_path / "chunked.onnx"))
    assert {"Shape", "Div", "Slice"} <= {node.op_type for node in model.graph.node}
    file = OnnxFile.read(tmp_path / "chunked.onnx")
    assert file.left == {}
    assert torch.equal(file.nodes[0].weights["weight_hh_l0"], module.rnn.weight_hh_l0)
    assert_same_answers(model, file.model)


@pytest.mark.parametrize("zeros", [False, True])
def test_steps_of_a_sequence_are_one_layer(zeros: bool, tmp_path: Path) -> None:
    model = sequence(4, zeros=zeros)
    onnx.save(model, str(tmp_path / "model.onnx"))
    file = OnnxFile.read(tmp_path / "model.onnx")
    assert file.left == {}
    assert [node.layer for node in file.nodes] == ["h0"] * 4
    assert_same_answers(model, file.model)
    dense = 4 * HIDDEN * (INPUTS + HIDDEN + 2)
    assert file.layer_sizes() == (dense, 4 * dense)
    twins = Twins(file.nodes)
    made = htcompress.compress(twins, ratio=2, bits=8)
    assert made.model is not None
    after = file.with_layers(made.model)
    # The layer is stored once, and written out once.
    weights = [i for i in after.written.graph.initializer if i.name.startswith("h0/")]
    assert sum(prod(i.dims) for i in weights) < dense
    assert [node.op_type for node in after.written.graph.node].count("LSTM") == 4
    given = drawn(model)
    states = [torch.from_numpy(given[name]) for name in "hc"] if not zeros else [torch.zeros(2, HIDDEN)] * 2
    with torch.no_grad():
        _, last = made.modules["h0"](torch.from_numpy(given["x"]).transpose(0, 1), tuple(s[None] for s in states))
    for found, wanted in zip(answers(after.written, given), last, strict=True):
        assert np.abs(found - wanted[0].numpy()).max() < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("open_batch", [False, True])
def test_a_loop_that_torch_has_exported(cell: type[nn.Module], open_batch: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stepping(cell(INPUTS, HIDDEN)).eval()
    axes = {"x": {0: "batch"}, "y": {0: "batch"}} if open_batch else {}
    path = str(tmp_path / "loop.onnx")
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
    torch.onnx.export(model, (torch.randn(2, 4, INPUTS),), path, dynamo=False, **names)
    file = OnnxFile.read(Path(path))
    assert file.left == {}
    assert [node.layer for node in file.nodes] == ["cell"] * 4
    assert torch.equal(file.nodes[0].weights["weight_hh_l0"], model.cell.weight_hh)
    assert_same_answers(onnx.load(path), file.model)


class Stepping(nn.Module):
    """A cell in a loop over the steps, from zeros on."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.two = cell, isinstance(cell, nn.LSTMCell)

    def forward(self, x: Tensor) -> Tensor:
        h, c = (x.new_zeros(x.shape[0], HIDDEN) for _ in range(2))
        found = []
        for k in range(x.shape[1]):
            if self.two:
                h, c = self.cell(x[:, k], (h, c))
            else:
                h = self.cell(x[:, k], h)
            found.append(h)
        return torch.stack(found, 1)


LEFT: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "a matrix that is read elsewhere": (
        lambda: sequence(read=True),
        "LSTM cell (92 % of the numbers), but has matrices that others read, too",
    ),
    "read inside": (lambda: spoilt("read inside"), "has an inner value"),
    "normalised": (lambda: spoilt("normalised"), "comes from LayerNormalization and which no matrix multiplies"),
    "peepholes": (lambda: spoilt("peepholes"), "which no matrix multiplies"),
    "another activation": (lambda: spoilt("hard"), "its matrices multiply the state h"),
}
"""What is left, and what is said of it."""


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left(case: str, tmp_path: Path) -> None:
    build, said = LEFT[case]
    model = build()
    onnx.save(model, str(tmp_path / "model.onnx"))
    file = OnnxFile.read(tmp_path / "model.onnx")
    assert file.nodes == []
    assert len(file.left) == 1
    reason = next(iter(file.left.values()))
    assert "looks like an unrolled" in reason
    assert said in reason
    assert file.content()[1] == model.SerializeToString()


def highway() -> onnx.ModelProto:
    """A gate that mixes a value with another, and belongs to no cell."""
    b = Builder()
    z, n = b.add("Sigmoid", b.dense("x", 6, 6)), b.add("Tanh", b.dense("x", 6, 6))
    b.add("Add", b.add("Mul", b.add("Sub", b.number(1.0), z), "x"), b.add("Mul", z, n), to="y")
    return b.model({"x": ["batch", 6]}, {"y": ["batch", 6]})


@pytest.mark.parametrize("build", [tagger, streaming, highway, lambda: node_model("LSTM", initial=True)])
def test_nothing_is_touched_where_there_is_none(build: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    model = build()
    assert rolled(model) == ([], {})
    onnx.save(model, str(tmp_path / "model.onnx"))
    file = OnnxFile.read(tmp_path / "model.onnx")
    assert file.model is file.written
    assert file.content()[1] == model.SerializeToString()


def branches(*, same: bool = False) -> onnx.ModelProto:
    """One of two LSTM cells of one step, by an input; `same`: with the same matrices."""
    b, parts = Builder(), list[onnx.GraphProto]()
    names = [[b.matrix(*n, name=f"{cell}.{k}") for k, n in enumerate(((7, 20), (5, 20), (20,)))] for cell in "ab"]
    for branch, (w, r, bias) in zip("ab", [names[0], names[0]] if same else names, strict=True):
        own = Builder()
        total = own.add("Add", own.add("MatMul", "x", w), own.add("MatMul", "h", r))
        i, f, g, o = own.split(own.add("Add", total, bias), 4)
        own.lstm(i, f, g, o, to=(f"h_{branch}", f"c_{branch}"))
        for node in own.nodes:
            for k, name in enumerate(node.output):
                node.output[k] = name if name.endswith(f"_{branch}") else f"{name}{branch}"
            for k, name in enumerate(node.input):
                node.input[k] = f"{name}{branch}" if name.startswith("v") else name
        out = [helper.make_tensor_value_info(f"{n}_{branch}", TensorProto.FLOAT, ["batch", 5]) for n in "hc"]
        parts.append(helper.make_graph(own.nodes, branch, [], out))
    b.nodes.append(helper.make_node("If", ["which"], ["h_new", "c_new"], then_branch=parts[0], else_branch=parts[1]))
    model = b.model(LSTM, LSTM_OUT)
    model.graph.input.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
    return model


@pytest.mark.parametrize("same", [False, True])
def test_branches(same: bool, tmp_path: Path) -> None:
    model = branches(same=same)
    onnx.save(model, str(tmp_path / "model.onnx"))
    file = OnnxFile.read(tmp_path / "model.onnx")
    assert file.left == {}
    assert [len(node.everywhere) for node in file.nodes] == ([2] if same else [1, 1])
    onnx.checker.check_model(file.model)
    given = {**drawn(model), "which": np.array(True)}
    for which in (True, False):
        given["which"] = np.array(which)
        for a, b in zip(answers(model, given), answers(file.model, given), strict=True):
            assert np.abs(a - b).max() < 1e-5
    # Without layers nothing is written anew.
    assert file.with_layers(nn.Identity()).content()[1] == model.SerializeToString()


def test_in_a_loop_it_is_named(tmp_path: Path) -> None:
    """What enters a body from call to call is not what a graph is fed with."""
    own = Builder()
    total = own.add("Add", own.add("MatMul", "x", own.matrix(7, 20)), own.add("MatMul", "h", own.matrix(5, 20)))
    i, f, g, o = own.split(own.add("Add", total, own.matrix(20)), 4)
    own.lstm(i, f, g, o)
    own.add("Identity", "going", to="goes_on")
    given = [helper.make_tensor_value_info("k", TensorProto.INT64, []), *_values("going", TensorProto.BOOL)]
    out = [*_values("goes_on", TensorProto.BOOL), *_states("h_new", "c_new")]
    body = helper.make_graph(own.nodes, "body", [*given, *_states("h", "c")], out, own.stored)
    b = Builder()
    count, going = b.number(3, dtype=np.int64), b.number(True, dtype=np.bool_)
    b.nodes.append(helper.make_node("Loop", [count, going, "h", "c"], ["h_new", "c_new"], "steps", body=body))
    model = b.model(LSTM, LSTM_OUT)
    onnx.checker.check_model(model)
    onnx.save(model, str(tmp_path / "model.onnx"))
    file = OnnxFile.read(tmp_path / "model.onnx")
    assert file.nodes == []
    assert file.model is file.written
    (why,) = file.left.values()
    assert "looks like an unrolled LSTM cell" in why
    assert "Loop" in why


def _values(name: str, kind: int) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, kind, [])]


def _states(*names: str) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 5]) for name in names]


def frames(count: int = 16, calls: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((count, calls, 4)).cumsum(1) @ rng.standard_normal((4, 20)) / 3).astype(np.float32)


def streamed(path: Path, x: np.ndarray) -> np.ndarray:
    """The scores of calls in a row, states passed on by their names."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    states = {n: np.zeros((len(x), k), np.float32) for n, k in (("h", 16), ("c", 16), ("s", 12))}
    found = []
    for k in range(x.shape[1]):
        scores, *new = session.run(["scores", "h_new", "c_new", "s_new"], {"frame": x[:, k], **states})
        states = dict(zip("hcs", new, strict=True))
        found.append(scores)
    return np.stack(found, 1)


QUICK = ("--layout", "svd", "--steps", "8", "-o", "out")


def test_convert(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(two_layers(), "model.onnx")
    np.savez("x.npz", frame=frames())
    ended = htc("convert", "model.onnx", "--budget", "1200", "--calibration", "x.npz", *QUICK)
    assert ended.code == 0, ended.err
    report = read_report(tmp_path / "out")
    assert [layer.kind for layer in report.layers] == ["lstm", "gru"]
    assert report.left == {}
    assert report.totals.parameters_after <= 1200
    # What is measured is what is written, on the samples that are kept apart.
    x = frames()[-4:]
    wanted, found = (streamed(Path(name), x) for name in ("model.onnx", "out/model.onnx"))
    error = np.sqrt(np.square(found - wanted).sum() / np.square(wanted - wanted.mean()).sum())
    assert error == pytest.approx(report.quality.finetuned, rel=1e-3)
    assert 0 < error < 0.9
    after = onnx.load("out/model.onnx").graph
    assert {i.name for i in onnx.load("model.onnx").graph.initializer} & {i.name for i in after.initializer} == {"last"}
    assert "Sigmoid" not in {node.op_type for node in after.node}


def test_one_of_two(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that is not compressed stays unrolled as it was."""
    monkeypatch.chdir(tmp_path)
    onnx.save(two_layers(), "model.onnx")
    options = ("--budget", "600", "--layers", "h_new", *QUICK)
    ended = htc("convert", "model.onnx", *options)
    assert ended.code == 0, ended.err
    before, after = onnx.load("model.onnx").graph, onnx.load("out/model.onnx").graph
    kept = [node for node in before.node if node in after.node]
    assert [node.op_type for node in kept].count("Tanh") == 1
    assert "GRU" not in {node.op_type for node in after.node}
    streamed(Path("out/model.onnx"), frames(2))


def test_inspect(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(two_layers(), "model.onnx")
    found = json.loads(htc("inspect", "model.onnx", "--json").out)
    assert [(layer["kind"], layer["name"]) for layer in found["layers"]] == [("lstm", "h_new"), ("gru", "s_new")]
    onnx.save(sequence(), "sequence.onnx")
    found = json.loads(htc("inspect", "sequence.onnx", "--json").out)
    assert [(layer["name"], layer["parameters"]) for layer in found["layers"]] == [("h0", 280)]
    onnx.save(sequence(read=True), "read.onnx")
    ended = htc("inspect", "read.onnx")
    assert ended.code == 2
    assert "looks like an unrolled LSTM cell (92 % of the numbers), but has matrices that others read" in ended.err


def test_a_file_that_runs_needs_none(htc: Command, tmp_path: Path) -> None:
    onnx.save(node_model("LSTM"), str(tmp_path / "model.onnx"))
    ended = htc("init", tmp_path / "model.onnx", "-o", tmp_path / "task.py")
    assert ended.code == 2
    assert "needs no task" in ended.err
    assert "--calibration inputs.npz" in ended.err
    assert not (tmp_path / "task.py").exists()

"""ONNX in, ONNX out, from the command line and without a line of Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from crossing import some
from onnx_models import clips, node_model, streaming, tagger
from small import Outcome

import htcompress
from htcompress.report import read_report
from htcompress.report.html import command
from htcompress.request import FineTuning, Goal

Command = Callable[..., Outcome]


def frames(count: int = 64, steps: int = 9, width: int = 20, seed: int = 0) -> np.ndarray:
    """Smooth frames of few directions, as real ones are."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, steps, 4)).cumsum(1) @ rng.standard_normal((4, width)) / 3).astype(np.float32)


def answers(path: Path, given: dict[str, np.ndarray]) -> list[Any]:
    return list(onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, given))


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(tagger(), "tagger.onnx")
    np.savez("x.npz", x=frames())
    return tmp_path


def test_convert(htc: Command, graph: Path) -> None:
    ended = htc("convert", "tagger.onnx", "--budget", "4kB", "--calibration", "x.npz", "--steps", "40", "-o", "out")
    assert ended.code == 0, ended.err
    assert "output_error" in ended.out
    report = read_report(graph / "out")
    assert report.source["format"] == "onnx"
    asked = ("tagger.onnx", "--budget", "4000B", "--calibration", "x.npz", "--steps", "40", "--seed", "0")
    assert command(report) == f"htcompress convert {' '.join(asked)}"
    assert [layer.name for layer in report.layers] == ["a_lstm", "y2"]
    quality = report.quality
    assert (quality.metric, quality.higher_is_better, quality.dense) == ("output_error", False, 0.0)
    assert quality.decomposed is not None
    assert quality.finetuned is not None
    assert 0 < quality.finetuned < quality.decomposed < 1
    assert report.totals.bytes_after <= 4000
    assert report.latency is not None
    assert "onnxruntime" in report.latency.of
    # What is measured is what is written, on the samples that are kept apart.
    x = frames()[-16:]
    wanted, found = (answers(path, {"x": x})[0] for path in (graph / "tagger.onnx", graph / "out" / "model.onnx"))
    error = np.sqrt(np.square(found - wanted).sum() / np.square(wanted - wanted.mean()).sum())
    assert error == pytest.approx(quality.finetuned, rel=1e-3)
    ended = htc("evaluate", "out", "--calibration", "x.npz", "--json")
    assert json.loads(ended.out)["output_error"] == pytest.approx(quality.finetuned, rel=0.5)
    # All else is as it was.
    before, after = onnx.load("tagger.onnx").graph, onnx.load("out/model.onnx").graph
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)
    kept = {i.name: i for i in after.initializer}
    assert all(kept[i.name] == i for i in before.initializer if i.name in ("first", "last", "flat"))
    ours = [node for node in after.node if node.output[0].startswith("ht") or node.op_type in ("LSTM", "GRU")]
    assert [n for n in after.node if n not in ours] == [n for n in before.node if n.op_type not in ("LSTM", "GRU")]
    assert htc("check", "out", "--max-bytes", "4k", "--max-drop", "1").code == 0
    assert htc("check", "out", "--max-metric", "0.0001").code == 1


@pytest.mark.full
def test_the_seed_decides(htc: Command, graph: Path) -> None:
    asked = ("convert", "tagger.onnx", "--budget", "600", "--calibration", "x.npz", "--steps", "5", "-o")
    for place in ("a", "b"):
        assert htc(*asked, place).code == 0
    assert (graph / "a" / "model.onnx").read_bytes() == (graph / "b" / "model.onnx").read_bytes()


def test_without_data(htc: Command, graph: Path) -> None:
    ended = htc("convert", "tagger.onnx", "--ratio", "4", "-o", "out")
    assert ended.code == 0, ended.err
    report = read_report(graph / "out")
    assert report.quality.metric is None
    assert report.totals.model_parameters_before - report.totals.parameters_before == 20 * 24 + 12 * 5
    answers(graph / "out" / "model.onnx", {"x": frames(2)})


def test_beyond_need_nothing_is_lost(htc: Command, graph: Path) -> None:
    options = ("--budget", "1m", "--calibration", "x.npz", "--no-finetune")
    assert htc("convert", "tagger.onnx", *options, "-o", "out").code == 0
    quality = read_report(graph / "out").quality
    assert quality.decomposed is not None
    assert quality.decomposed < 1e-5


def test_targets(htc: Command, graph: Path) -> None:
    wanted = answers(graph / "tagger.onnx", {"x": frames()})[0].argmax(-1)
    np.savez("y.npz", x=frames(), wanted=wanted)
    options = ("--budget", "2kB", "--calibration", "y.npz", "--targets", "wanted", "--steps", "40")
    assert htc("convert", "tagger.onnx", *options, "-o", "out").code == 0
    quality = read_report(graph / "out").quality
    assert (quality.metric, quality.dense, quality.higher_is_better) == ("accuracy", 1.0, True)
    assert quality.finetuned is not None
    assert 0.5 < quality.finetuned <= 1
    assert set(quality.metrics["finetuned"]) == {"accuracy", "output_error"}
    options = ("--calibration", "y.npz", "--targets", "wanted", "--json")
    assert json.loads(htc("evaluate", "tagger.onnx", *options).out) == {"accuracy": 1.0}
    found = json.loads(htc("evaluate", "out", *options).out)
    assert found.keys() == {"accuracy", "output_error"}
    (graph / "tagger.onnx").unlink()
    assert json.loads(htc("evaluate", "out", *options).out) == {"accuracy": found["accuracy"]}
    ended = htc("evaluate", "out", "--calibration", "x.npz")
    assert ended.code == 2
    assert "is not found. Give --targets" in ended.err


@pytest.mark.full
@pytest.mark.parametrize("count", some([1, 3, 5, 11], 1, 5))
def test_few_samples(htc: Command, graph: Path, count: int) -> None:
    np.savez("few.npz", x=frames(count))
    options = ("--ratio", "4", "--calibration", "few.npz", "--no-finetune", "-o", "out")
    ended = htc("convert", "tagger.onnx", *options)
    assert ended.code == 0, ended.err
    assert ("measured on those of calibration" in ended.err) == (count == 1)


@pytest.mark.full
def test_a_fixed_batch(htc: Command, graph: Path) -> None:
    model = tagger()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, "four.onnx")
    for count in (4, 9):
        np.savez("few.npz", x=frames(count))
        options = ("--ratio", "4", "--calibration", "few.npz", "--no-finetune", "-o", "out")
        ended = htc("convert", "four.onnx", *options)
        assert ended.code == 0, ended.err


@pytest.mark.full
def test_a_graph_that_takes_no_batches_though_it_says_so(htc: Command, graph: Path) -> None:
    model = tagger()
    flat = next(i for i in model.graph.initializer if i.name == "flat")
    flat.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 1, -1], dtype=np.int64), "flat"))
    last = next(node for node in model.graph.node if node.output[0] == "y2f")
    last.input[1] = "flat2"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, -1, 12], dtype=np.int64), "flat2"))
    next(n for n in model.graph.node if n.output[0] == "y1t").attribute[0].ints[:] = [0, 2, 1, 3]
    # With a batch of 2 the GRU reads twice as many numbers as it has weights for.
    onnx.save(model, "single.onnx")
    options = ("--ratio", "4", "--calibration", "x.npz", "--steps", "5")
    ended = htc("convert", "single.onnx", *options, "-o", "out")
    assert ended.code == 0, ended.err
    assert read_report(graph / "out").quality.decomposed is not None


def test_states_from_call_to_call(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(streaming(), "streaming.onnx")
    np.savez("x.npz", frame=frames(48, 12, 10))
    ended = htc("convert", "streaming.onnx", "--ratio", "3", "--calibration", "x.npz", "--steps", "60", "-o", "out")
    assert ended.code == 0, ended.err
    quality = read_report(tmp_path / "out").quality
    assert quality.decomposed is not None
    assert quality.finetuned is not None
    assert 0 < quality.finetuned < quality.decomposed < 1
    # By hand: one frame after the other, the state passed on.
    x, worst = frames(48, 12, 10)[-12:], []
    sessions = [onnxruntime.InferenceSession(f"{n}.onnx") for n in ("streaming", "out/model")]
    states = [np.zeros((1, 12, 12), np.float32)] * 2
    for k in range(12):
        found = [s.run(None, {"frame": x[:, k], "state": state}) for s, state in zip(sessions, states, strict=True)]
        states = [f[1] for f in found]
        worst.append((found[0][0], found[1][0]))
    wanted, given = (np.concatenate([pair[i].ravel() for pair in worst]) for i in (0, 1))
    error = np.sqrt(np.square(given - wanted).sum() / np.square(wanted - wanted.mean()).sum())
    assert error == pytest.approx(quality.finetuned, rel=1e-3)


def test_clips_that_are_one_call_or_many(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps first and both states in one array: cut into calls or not, it is one sequence, measured at every step."""
    monkeypatch.chdir(tmp_path)
    onnx.save(clips(), "clips.onnx")
    x, zeros = frames(40, 12, 10), np.zeros((2, 1, 12), np.float32)
    wanted = np.stack([answers(Path("clips.onnx"), {"clip": own, "both": zeros})[0] for own in x])
    targets = wanted > 0.4
    for name, cut in (("one", x[:, None]), ("many", x)):
        np.savez(f"{name}.npz", clip=cut, wanted=targets)
        options = ("--calibration", f"{name}.npz", "--targets", "wanted")
        ended = htc("convert", "clips.onnx", "--ratio", "3", "--steps", "20", *options, "-o", name)
        assert ended.code == 0, ended.err
        quality = read_report(tmp_path / name).quality
        assert quality.dense == pytest.approx(((wanted > 0.5) == targets)[-10:].mean())
        # By hand, in onnxruntime.
        found = [answers(Path(name, "model.onnx"), {"clip": own, "both": zeros})[0] for own in x[-10:]]
        assert quality.finetuned == pytest.approx(((np.stack(found) > 0.5) == targets[-10:]).mean())
        error = np.sqrt(np.square(found - wanted[-10:]).sum() / np.square(wanted[-10:] - wanted[-10:].mean()).sum())
        assert quality.metrics["finetuned"]["output_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.full
def test_again_from_what_was_made(htc: Command, graph: Path) -> None:
    """ONNX, HT, ONNX, HT: the recurrent nodes of a result have weights that nodes make of its cores."""
    options = ("--calibration", "x.npz", "--steps", "5", "-o")
    assert htc("convert", "tagger.onnx", "--ratio", "2", *options, "once").code == 0
    ended = htc("convert", "once/model.onnx", "--ratio", "4", *options, "twice")
    assert ended.code == 0, ended.err
    assert len(read_report(graph / "twice").layers) == 2
    # What reduces the input before a node stays; the node's own weights do not.
    once, twice = ({i.name for i in onnx.load(f"{d}/model.onnx").graph.initializer} for d in ("once", "twice"))
    assert len(once & twice) < len(once) / 2
    wanted, found = (answers(Path(name), {"x": frames()})[0] for name in ("tagger.onnx", "twice/model.onnx"))
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.8


@pytest.mark.full
def test_some_layers(htc: Command, graph: Path) -> None:
    options = ("--layers", "y*", "--calibration", "x.npz", "--steps", "5")
    assert htc("convert", "tagger.onnx", "--ratio", "3", *options).code == 0
    after = onnx.load("tagger-ht/model.onnx").graph
    assert {"W1", "R1", "B1"} <= {i.name for i in after.initializer}


def test_inspect(htc: Command, graph: Path) -> None:
    ended = htc("inspect", "tagger.onnx", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [layer["name"] for layer in found["layers"]] == ["a_lstm", "y2"]
    assert found["parameters"] == sum(np.prod(i.dims) for i in tagger().graph.initializer if i.name != "flat")


def test_inspect_names_what_no_node_computes(htc: Command, graph: Path) -> None:
    """Weights that bear torch's names, of cells that an exporter has unrolled."""
    model = tagger()
    rows = {"weight_ih": (48, 20), "weight_hh": (48, 12), "bias_ih": (48,), "bias_hh": (48,)}
    cell = [onnx.numpy_helper.from_array(np.ones(n, np.float32), f"cell.{name}") for name, n in rows.items()]
    model.graph.initializer.extend(cell)
    onnx.save(model, "both.onnx")
    found = json.loads(htc("inspect", "both.onnx", "--json").out)
    assert [layer["name"] for layer in found["layers"]] == ["a_lstm", "y2"]
    assert "it was unrolled when it was exported" in found["left"]["cell"]
    model = node_model("GRU", clip=2.0)
    onnx.save(model, "none.onnx")
    ended = htc("inspect", "none.onnx")
    assert ended.code == 2
    assert "None of the recurrent layers of none.onnx can be compressed. layer stays dense" in ended.err


@pytest.mark.full
def test_from_python(graph: Path) -> None:
    made = htcompress.convert(
        graph / "tagger.onnx", goal=Goal(bytes=3000), calibration=graph / "x.npz", finetuning=FineTuning(3)
    )
    assert onnx.load_from_string(made.files["model.onnx"]).graph.name == "tagger"


BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no such task": (("--task", "task.py"), ("There is no task file task.py",)),
    "no such array": (("--calibration", "x.npz", "--targets", "y"), ("has no array y", "it holds x")),
    "a metric alone": (("--calibration", "x.npz", "--metric", "mse"), ("--metric needs --targets",)),
    "an unknown metric": (("--calibration", "x.npz", "--targets", "x", "--metric", "wer"), ("accuracy, mse, mae",)),
    "no such file": (("--calibration", "no.npz"), ("There is no file no.npz", "x (batch, time, 20)")),
    "no such layer": (("--layers", "rnn"), ("rnn", "a_lstm")),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense(htc: Command, graph: Path, case: str) -> None:
    options, said = BAD[case]
    ended = htc("convert", "tagger.onnx", "--ratio", "3", *options, "-o", "out")
    assert ended.code == 2, ended.out
    assert all(word in ended.err for word in said), ended.err
    assert not (graph / "out").exists()


def test_nothing_to_measure(htc: Command, graph: Path) -> None:
    for options, said in (
        ((), "give --calibration"),
        (("--calibration", "x.npz"), "nothing to measure tagger.onnx against"),
    ):
        ended = htc("evaluate", "tagger.onnx", *options)
        assert ended.code == 2
        assert said in ended.err


def test_files_without_recurrent_nodes(htc: Command, graph: Path) -> None:
    model = tagger()
    keep = [node for node in model.graph.node if node.op_type == "MatMul"][:1]
    keep[0].input[0] = "x"
    del model.graph.node[:]
    model.graph.node.extend(keep)
    model.graph.output[0].name = "p"
    onnx.save(model, "none.onnx")
    ended = htc("convert", "none.onnx", "--ratio", "3")
    assert ended.code == 2
    assert "has no LSTM, GRU or RNN nodes" in ended.err
    onnx.save(node_model("GRU", clip=2.0), "old.onnx")
    ended = htc("convert", "old.onnx", "--ratio", "3")
    assert ended.code == 2
    assert "clips what enters its gates" in ended.err
    (graph / "cut.onnx").write_bytes((graph / "tagger.onnx").read_bytes()[:4000])
    ended = htc("convert", "cut.onnx", "--ratio", "3")
    assert ended.code == 2
    assert "cannot be read" in ended.err


def test_calibration_is_for_models_that_run_by_themselves(htc: Command, graph: Path) -> None:
    import torch

    torch.save(torch.nn.LSTM(8, 8).state_dict(), "model.pt")
    ended = htc("convert", "model.pt", "--ratio", "3", "--calibration", "x.npz")
    assert ended.code == 2
    assert "is none. Name its class with --model" in ended.err


def test_a_graph_without_recurrent_layers_is_told_so(htc: Command, tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])
    weight = onnx.numpy_helper.from_array(np.ones((3, 3), np.float32), "weight")
    product = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])
    made = onnx.helper.make_graph([product], "dense", [value], [output], [weight])
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "dense.onnx")
    told = htc("inspect", tmp_path / "dense.onnx")
    assert told.code == 2
    assert "no LSTM, GRU or RNN node in it" in told.err

"""A Python task beside a model that runs from its own file: what it yields, what it measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_models import streaming, tagger
from small import Outcome

import htcompress
from htcompress.errors import TaskError
from htcompress.graphs.feeds import Value
from htcompress.graphs.formats import read_graph
from htcompress.graphs.yielded import Running, YieldedFeeds, count_of, feed_of
from htcompress.report import read_report
from htcompress.report.html import command
from htcompress.report.study import Study
from htcompress.request import FineTuning, Goal
from htcompress.task import load_task

Command = Callable[..., Outcome]

DATA = """
import numpy as np

def batches(seed, count, width=20):
    rng = np.random.default_rng(seed)
    way = np.random.default_rng(7).standard_normal((4, width)) / 3
    for k in range(count):
        steps = 5 + 3 * (k % 3)
        yield (rng.standard_normal((4, steps, 4)).cumsum(1) @ way).astype(np.float32)
"""

TASK = (
    DATA
    + """
def calibration():
    for k, x in enumerate(batches(1, 18)):
        yield {"x": x} if k % 2 else (x,)

def evaluate(model):
    return {"confidence": float(np.mean([model(x).max(-1).mean() for x in batches(2, 6)]))}
"""
)


def frames(seed: int, count: int, width: int = 20) -> list[np.ndarray]:
    space: dict[str, Any] = {}
    exec(DATA, space)
    return list(space["batches"](seed, count, width))


def confidence(path: Path) -> float:
    """By hand, in onnxruntime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return float(np.mean([session.run(None, {"x": x})[0].max(-1).mean() for x in frames(2, 6)]))


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(tagger(), "tagger.onnx")
    (tmp_path / "own.py").write_text(TASK)
    return tmp_path


def test_a_task_yields_and_measures(htc: Command, graph: Path) -> None:
    """Batches of several lengths, which no array holds, and a metric that no option names."""
    ended = htc("convert", "tagger.onnx", "--budget", "4kB", "--task", "own.py", "--steps", "20", "-o", "out")
    assert ended.code == 0, ended.err
    report = read_report(graph / "out")
    assert (report.request["task"], report.request["data"]) == ("own.py", None)
    words = "convert tagger.onnx --budget 4000B --task own.py --steps 20 --seed 0"
    assert command(report) == f"htcompress {words}"
    quality = report.quality
    assert (quality.metric, quality.higher_is_better) == ("confidence", True)
    assert quality.dense == pytest.approx(confidence(graph / "tagger.onnx"), rel=1e-6)
    assert quality.finetuned == pytest.approx(confidence(graph / "out" / "model.onnx"), rel=1e-4)
    assert quality.finetuned != quality.dense
    assert report.latency is not None
    for source, wanted in (("out", quality.finetuned), ("tagger.onnx", quality.dense)):
        ended = htc("evaluate", source, "--task", "own.py", "--json")
        assert json.loads(ended.out) == {"confidence": pytest.approx(wanted, rel=1e-4)}, ended.err
    assert htc("check", "out", "--max-bytes", "4k", "--max-drop", "0.5").code == 0


def test_a_task_that_only_yields(htc: Command, graph: Path) -> None:
    (graph / "own.py").write_text(TASK.split("def evaluate")[0])
    ended = htc("convert", "tagger.onnx", "--budget", "4kB", "--task", "own.py", "--steps", "20", "-o", "out")
    assert ended.code == 0, ended.err
    quality = read_report(graph / "out").quality
    assert quality.metric == "output_error"
    sessions = [onnxruntime.InferenceSession(str(graph / name)) for name in ("tagger.onnx", "out/model.onnx")]
    # A quarter of the batches, the last ones, was kept apart.
    wanted, found = (np.concatenate([s.run(None, {"x": x})[0].ravel() for x in frames(1, 18)[14:]]) for s in sessions)
    error = np.sqrt(np.square(found - wanted).sum() / np.square(wanted - wanted.mean()).sum())
    assert quality.finetuned == pytest.approx(error, rel=1e-3)
    ended = htc("evaluate", "out", "--task", "own.py", "--json")
    assert json.loads(ended.out).keys() == {"output_error"}


def test_a_task_that_only_measures(htc: Command, graph: Path) -> None:
    (graph / "own.py").write_text(DATA + "\ndef evaluate" + TASK.split("def evaluate")[1] + "\ndef training(): ...\n")
    np.savez("x.npz", x=np.concatenate([x[:, :5] for x in frames(1, 12)]))
    options = ("--budget", "4kB", "--task", "own.py", "--calibration", "x.npz", "--no-finetune", "-o", "out")
    ended = htc("convert", "tagger.onnx", *options)
    assert ended.code == 0, ended.err
    assert "training() of own.py is not used" in ended.err
    report = read_report(graph / "out")
    assert report.quality.decomposed == pytest.approx(confidence(graph / "out" / "model.onnx"), rel=1e-4)
    assert (report.request["task"], report.request["data"]["calibration"]) == ("own.py", "x.npz")


STREAM = (
    DATA
    + """
def calibration():
    for x in batches(1, 16, 10):
        yield [{"frame": x[:, k]} for k in range(x.shape[1])]

def evaluate(model):
    found = []
    for x in batches(2, 4, 10):
        state = np.zeros((1, 4, 12), np.float32)
        for k in range(x.shape[1]):
            out = model(x[:, k], state)
            assert list(out) == model.outputs
            found.append(out[model.outputs[0]])
            state = out[model.outputs[1]]
        again = model(frame=x[:, 0])
        assert np.allclose(again[model.outputs[0]], found[-x.shape[1]])
    return {"mean_square": float(np.mean([np.square(own).mean() for own in found]))}

higher_is_better = False
"""
)


def test_calls_in_a_row(htc: Command, graph: Path) -> None:
    onnx.save(streaming(), "streaming.onnx")
    (graph / "own.py").write_text(STREAM)
    ended = htc("convert", "streaming.onnx", "--ratio", "3", "--task", "own.py", "--steps", "30", "-o", "out")
    assert ended.code == 0, ended.err
    quality = read_report(graph / "out").quality
    assert (quality.metric, quality.higher_is_better) == ("mean_square", False)
    found = []
    session = onnxruntime.InferenceSession(str(graph / "out" / "model.onnx"))
    for x in frames(2, 4, 10):
        state = np.zeros((1, 4, 12), np.float32)
        for k in range(x.shape[1]):
            out, state = session.run(None, {"frame": x[:, k], "state": state})
            found.append(np.square(out).mean())
    assert quality.finetuned == pytest.approx(float(np.mean(found)), rel=1e-4)


def test_states_go_on_from_call_to_call(graph: Path) -> None:
    onnx.save(streaming(), "streaming.onnx")
    (graph / "own.py").write_text(STREAM)
    session = read_graph(Path("streaming.onnx")).session()
    feeds = YieldedFeeds.read(load_task("own.py", needs=()), session)
    assert (feeds.samples, feeds.size, feeds.calls) == (16, 1, True)
    (calls,) = feeds.part(2, 3).sequences()
    x = frames(1, 3, 10)[2]
    state, plain = np.zeros((1, 4, 12), np.float32), onnxruntime.InferenceSession("streaming.onnx")
    for k, own in enumerate(session.answers(calls, feeds.states)):
        out, state = plain.run(None, {"frame": x[:, k], "state": state})
        assert np.allclose(own[session.outputs[0].name], out, atol=1e-6)
    assert k == x.shape[1] - 1


def test_how_it_is_called(graph: Path) -> None:
    run = Running(read_graph(Path("tagger.onnx")).session(), "own.py")
    x = frames(3, 1)[0]
    wanted = onnxruntime.InferenceSession("tagger.onnx").run(None, {"x": x})[0]
    assert (run.inputs, len(run.outputs)) == (["x"], 1)
    for found in (run(x), run(x=x), run({"x": x}), run(x.tolist()), run(x.astype(np.float64))):
        assert isinstance(found, np.ndarray)
        assert np.allclose(found, wanted, atol=1e-6)
    assert np.allclose(run(torch.from_numpy(x).bfloat16()).numpy(), wanted, atol=0.05)
    with pytest.raises(TaskError, match="gives x twice"):
        run(x, x=x)
    tensor = run(torch.from_numpy(x))
    assert isinstance(tensor, torch.Tensor)
    assert np.allclose(tensor.numpy(), wanted, atol=1e-6)
    for arguments, said in (
        (({"y": x},), "evaluate() of own.py gives y; the model's inputs are x (batch, time, 20)"),
        ((x, x), "gives 2 arrays; the model's inputs are x"),
        ((x + 1j,), "its numbers are complex"),
        (([[1.0, 2.0], [3.0]],), "which is no array of float"),
        (("text",), "which is no array of float"),
        ((x[0],), "gives x of shape (5, 20); the model's inputs are x (batch, time, 20)"),
    ):
        with pytest.raises(TaskError, match=r"\w") as told:
            run(*arguments)
        assert said in str(told.value)


def test_what_is_no_state_is_not_left_out(graph: Path) -> None:
    onnx.save(streaming(), "streaming.onnx")
    run = Running(read_graph(Path("streaming.onnx")).session(), "own.py")
    with pytest.raises(TaskError, match="has no array for the input frame"):
        run(state=np.zeros((1, 1, 12), np.float32))


def test_an_array_that_is_filled_anew(graph: Path) -> None:
    (graph / "own.py").write_text(
        "import numpy as np\ndef calibration():\n    x = np.zeros((1, 2, 20), np.float32)\n"
        "    for k in range(3):\n        x[:] = k\n        yield x\n"
    )
    feeds = YieldedFeeds.read(load_task("own.py", needs=()), read_graph(Path("tagger.onnx")).session())
    assert [calls[0]["x"].max() for calls in feeds.batches] == [0, 1, 2]


def test_a_list_of_arrays_is_the_inputs_where_there_are_no_states(graph: Path) -> None:
    (graph / "own.py").write_text("import numpy as np\ndef calibration():\n    yield [np.zeros((2, 3, 20))]\n")
    feeds = YieldedFeeds.read(load_task("own.py", needs=()), read_graph(Path("tagger.onnx")).session())
    assert (feeds.calls, feeds.batches[0][0]["x"].shape) == (False, (2, 3, 20))


def test_numbers_without_axes() -> None:
    inputs = [Value("rate", (1,), "tensor(int64)"), Value("x", (None, 4), "tensor(float)")]
    found = feed_of((16000, np.ones((2, 4))), inputs, "calibration()")
    assert count_of(found, {value.name: value for value in inputs}) == 2
    assert found["rate"].tolist() == [16000]
    assert (found["x"].dtype, found["rate"].dtype) == (np.float32, np.int64)


@pytest.mark.full
def test_a_sweep(htc: Command, graph: Path) -> None:
    ended = htc("sweep", "tagger.onnx", "--budgets", "4kB", "--task", "own.py", "--no-finetune", "--jobs", "1")
    assert ended.code == 0, ended.err
    made = Study.from_json((graph / "tagger-sweep" / "study.json").read_text())
    assert (made.metric, made.request["task"]) == ("confidence", "own.py")
    single = htcompress.convert("tagger.onnx", goal=Goal(bytes=4000), task="own.py", finetuning=FineTuning(0))
    assert made.points[0].final == single.report.quality.final
    assert made.points[0].latency_ms is not None


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        (TASK, ("--calibration", "x.npz"), "calibration() of own.py are both data"),
        ("def evaluate(model): return 1.0", (), "lacks calibration(), which a model that runs from its own file"),
        (
            "def evaluate(model): return 1.0",
            ("--calibration", "x.npz", "--targets", "x"),
            "--targets and evaluate() of own.py both say what is measured",
        ),
        ("def calibration(): return []", (), "calibration() of own.py yields nothing"),
        ("def calibration(): yield []", (), "calibration() of own.py yields nothing"),
        ("def calibration(): yield {}", (), "gives nothing; the model's inputs are x (batch, time, 20)"),
        ("def calibration(): yield {'y': 0}", (), "gives y; the model's inputs are x (batch, time, 20)"),
        (
            "import numpy\nX = numpy.zeros((2, 3, 20))\ndef calibration(): return [X, [{'x': X}]]",
            (),
            "yields batches of unlike forms",
        ),
        ("import numpy\ndef calibration(): yield numpy.zeros((2, 3, 9))", (), "gives x of shape (2, 3, 9)"),
        ("def calibration(): 1 / 0", (), "calibration() in own.py raised ZeroDivisionError"),
        (TASK.replace("model(x).max", "model(x).mode"), (), "evaluate() in own.py raised AttributeError"),
        (TASK, ("--model", "own.py:Tagger"), "leave out one of them"),
    ],
)
def test_what_cannot_be(htc: Command, graph: Path, task: str, options: tuple[str, ...], words: str) -> None:
    (graph / "own.py").write_text(task)
    np.savez("x.npz", x=frames(1, 1)[0])
    ended = htc("convert", "tagger.onnx", "--ratio", "3", "--task", "own.py", *options, "-o", "out")
    assert ended.code == 2, ended.out
    assert words in " ".join(ended.err.split())
    assert not (graph / "out").exists()

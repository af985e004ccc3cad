"""Sweeps and comparisons of models that run from their files, and of models that a class makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_models import node_model
from small import TASK, Outcome, clips, save_tagger

import htcompress
from htcompress.report import read_report
from htcompress.report.study import Study
from htcompress.request import Goal

Command = Callable[..., Outcome]

TUNED = ("--jobs", "1", "--steps", "5")


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(node_model("LSTM"), "net.onnx")
    rng = np.random.default_rng(0)
    name, shape = _input(onnx.load("net.onnx"))
    np.savez("x.npz", **{name: rng.standard_normal((32, *shape)).astype(np.float32)})
    return tmp_path


def _input(model: onnx.ModelProto) -> tuple[str, list[int]]:
    """The first input, and a whole one of it."""
    first = model.graph.input[0]
    return first.name, [axis.dim_value or 5 for axis in first.type.tensor_type.shape.dim]


def test_a_sweep_of_a_graph(htc: Command, graph: Path) -> None:
    command = ("sweep", "net.onnx", "--budgets", "300", "--calibration", "x.npz", *TUNED, "-o", "out")
    ended = htc(*command)
    assert ended.code == 0, ended.err
    made = Study.from_json((graph / "out" / "study.json").read_text())
    assert made.metric == "output_error"
    assert made.dense.metric == 0.0
    assert made.latency is not None
    assert "onnxruntime" in made.latency
    assert made.dense.latency_ms is not None
    for point in made.points:
        place = graph / "out" / "points" / point.case.name
        single = htcompress.convert(
            "net.onnx",
            goal=Goal(point.case.budget, bytes=point.case.bytes, bits=point.case.bits),
            calibration="x.npz",
            finetuning=htcompress.FineTuning(5),
        )
        assert (place / "model.onnx").read_bytes() == single.files["model.onnx"]
        assert point.latency_ms is not None
        assert read_report(place).request["data"] == {"calibration": "x.npz", "targets": None, "metric": None}
        assert (point.parameters, point.finetuned) == (
            single.report.totals.parameters_after,
            single.report.quality.finetuned,
        )
        ended = htc("evaluate", place, "--calibration", "x.npz", "--json")
        assert "output_error" in json.loads(ended.out)
    assert "1 of 1 points are there already" in htc(*command).err
    # Other data makes other points.
    arrays = dict(np.load("x.npz"))
    np.savez("x.npz", **{name: array + 1 for name, array in arrays.items()})
    assert "are there already" not in htc(*command).err


def test_a_comparison_of_a_graph(htc: Command, graph: Path) -> None:
    ended = htc(
        "compare",
        "net.onnx",
        "--budget",
        "2kB",
        "--formats",
        "ht,dense",
        "--no-finetune",
        "--jobs",
        "1",
        "--json",
        "-q",
    )
    assert ended.code == 0, ended.err
    points = json.loads(ended.out)["points"]
    assert {point["case"]["format"] for point in points} == {"ht", "dense"}
    assert points[0]["bytes"] <= 2000
    ended = htc(
        "compare", "net.onnx", "--budget", "300", "--formats", "svd", "--no-finetune", "--jobs", "1", "-o", "svd"
    )
    assert "give data with --calibration X.npz" in ended.out
    assert all(point["latency_ms"] is None for point in points)


@pytest.mark.full
def test_a_class_in_place_of_a_task(htc: Command, tmp_path: Path) -> None:
    save_tagger(tmp_path / "model.pt")
    (tmp_path / "own.py").write_text(TASK.split("def batches")[0])
    x = torch.cat([clips(seed) for seed in range(12)])
    np.savez(tmp_path / "x.npz", x=x.numpy())
    command = ("--model", "own.py:Tagger", "--calibration", "x.npz", *TUNED)
    ended = htc("sweep", "model.pt", "--budgets", "300", *command)
    assert ended.code == 0, ended.err
    made = Study.from_json((tmp_path / "model-sweep" / "study.json").read_text())
    assert (made.metric, made.request["task"]) == ("output_error", None)
    assert made.request["model"] == "--model own.py:Tagger --calibration x.npz"
    report = read_report(tmp_path / "model-sweep" / "points" / "ht-300")
    assert report.request["model"] == {
        "name": "own.py:Tagger",
        "arguments": "{}",
        "calibration": "x.npz",
        "targets": None,
        "metric": None,
    }
    single = htcompress.convert("model.pt", goal=Goal(300), model="own.py:Tagger", calibration="x.npz")
    assert made.points[0].decomposed == single.report.quality.decomposed
    assert "1 of 1 points are there already" in htc("sweep", "model.pt", "--budgets", "300", *command).err
    # A changed file makes other points, and so does another class in it.
    (tmp_path / "own.py").write_text(TASK.split("def batches")[0] + "\n\nclass Other(Tagger):\n    pass\n")
    assert "are there already" not in htc("sweep", "model.pt", "--budgets", "300", *command).err
    others = [word.replace("own.py:Tagger", "own.py:Other") for word in command]
    assert "are there already" not in htc("sweep", "model.pt", "--budgets", "300", *others).err


def test_arrays_of_a_checkpoint_may_have_other_names(htc: Command, tmp_path: Path) -> None:
    state = {"model": torch.load(save_tagger(tmp_path / "model.pt")), "ema": torch.load(tmp_path / "model.pt")}
    torch.save(state, tmp_path / "two.pt")
    (tmp_path / "own.py").write_text(TASK)
    ended = htc("sweep", "two.pt", "--budgets", "300", "--task", "own.py", "--weights", "ema", *TUNED)
    assert ended.code == 0, ended.err
    assert read_report(tmp_path / "two-sweep" / "points" / "ht-300").source["weights"] == "ema"
    ended = htc("sweep", "two.pt", "--budgets", "300", "--task", "own.py", "--weights", "model", *TUNED)
    assert "are there already" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("net.onnx", "--task", "own.py"), "gives X of shape (8, 5, 24); the model's inputs are X"),
        (("net.onnx", "--calibration", "none.npz"), "none.npz"),
        (("net.onnx", "--calibration", "x.npz", "--metric", "mse"), "--metric needs --targets NAME"),
        (("net.onnx", "--names", "a=b"), "Leave it out"),
        (("model.pt",), "needs --task TASK, or --model package.module:Class and --calibration X.npz"),
        (("net.onnx", "--model", "own.py:Tagger"), "in place of --model"),
        (("model.pt", "--calibration", "x.npz"), "Name its class with --model package.module:Class"),
        (("model.pt", "--task", "own.py", "--calibration", "x.npz"), "by --calibration X.npz or by --task"),
        (("model.pt", "--task", "own.py", "--model", "own.py:Tagger"), "leave out one of them"),
        (("model.pt", "--model-arguments", "{}"), "--model-arguments needs --model"),
    ],
)
def test_what_cannot_be(htc: Command, graph: Path, arguments: tuple[str, ...], words: str) -> None:
    save_tagger(graph / "model.pt")
    (graph / "own.py").write_text(TASK)
    ended = htc("sweep", *arguments, "--budgets", "300", *TUNED)
    assert ended.code == 2
    assert words in " ".join(ended.err.split())
    assert not list(graph.glob("*-sweep"))

"""A class and arrays in place of a task: the same stages by another door, and words for what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import Listener, Outcome
from torch import nn

import htcompress
from htcompress.construction import Constructed
from htcompress.errors import CheckpointError, RequestError, TaskError
from htcompress.plain_task import made_task
from htcompress.request import Goal, Request
from htcompress.vocabulary import LayoutKind

Command = Callable[..., Outcome]

MODELS = """\
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self, hidden, classes=3, softmax=False):
        super().__init__()
        self.rnn = nn.LSTM(12, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)
        self.softmax = softmax

    def forward(self, x, scale=None, *, shift=None):
        x = x if scale is None else x * scale.view(-1, 1, 1)
        y = self.head(self.rnn(x if shift is None else x + shift)[0][:, -1])
        return y.softmax(-1) if self.softmax else y


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(12, 6)

    def forward(self, x):
        return self.rnn(x)[0]


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.rnn = nn.GRU(12, 6, batch_first=True)

    def forward(self, symbols):
        return self.rnn(self.embedding(symbols))


def no_module():
    return 3
"""
COUNT = 64
SVD = Goal(budget=300, layout=LayoutKind.SVD)
X = np.random.default_rng(0).standard_normal((COUNT, 5, 12))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models, a trained `Tagger`, and arrays: inputs, classes that it answers, its outputs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    model = fresh("Tagger", hidden=8)
    torch.save(model.state_dict(), "model.pt")
    with torch.no_grad():
        y = model(torch.from_numpy(X).float()).numpy()
    np.savez("x.npz", x=X)
    np.savez("xc.npz", x=X, classes=y.argmax(-1))
    np.savez("xv.npz", x=X, values=y)
    return tmp_path


def fresh(name: str, **arguments: Any) -> nn.Module:
    scope: dict[str, Any] = {"__name__": "models"}
    exec(MODELS, scope)
    torch.manual_seed(0)
    made: nn.Module = scope[name](**arguments).eval()
    return made


def asked(name: str = "models.py:Tagger", data: str | None = "x.npz", *more: str, **arguments: Any) -> Constructed:
    return Constructed(name, arguments or ({"hidden": 8} if "Tagger" in name else {}), data, *more)


def test_convert_without_targets(place: Path) -> None:
    listener = Listener()
    made = htcompress.convert(
        "model.pt",
        goal=SVD,
        model="models.py:Tagger",
        model_arguments={"hidden": 8},
        calibration="x.npz",
        finetuning=htcompress.FineTuning(steps=3),
        observer=listener,
    )
    quality = made.report.quality
    assert (quality.metric, quality.higher_is_better, quality.dense) == ("output_error", False, 0.0)
    assert quality.decomposed is not None
    assert quality.finetuned is not None
    # The last quarter is measured on, by hand: root of the squared difference over the variance.
    dense, x = fresh("Tagger", hidden=8), torch.from_numpy(X[-COUNT // 4 :]).float()
    assert made.model is not None
    with torch.no_grad():
        wanted, found = dense(x).double(), made.model(x).double()
    lost = ((wanted - found).square().sum() / (wanted - wanted.mean()).square().sum()).sqrt()
    assert quality.finetuned == pytest.approx(float(lost), rel=1e-4)
    assert made.report.timings_s.statistics is not None
    assert listener.messages == []


@pytest.mark.parametrize(("targets", "metric"), [("classes", "accuracy"), ("values", "mse"), ("values", "mae")])
def test_targets_are_measured_and_trained_on(place: Path, targets: str, metric: str) -> None:
    task = made_task(asked("models.py:Tagger", f"x{targets[0]}.npz", targets, metric), None, Listener())
    model = fresh("Tagger", hidden=8)
    assert task.evaluate(model) == {metric: pytest.approx(float(metric == "accuracy"), abs=1e-6)}
    assert task.higher_is_better == (metric == "accuracy")
    pairs = list(task.training())
    assert sum(len(target) for _, target in pairs) == COUNT * 3 // 4
    assert task.loss is not None
    (inputs,), target = pairs[0]
    worse = fresh("Tagger", hidden=8)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.mul_(-1)
    assert task.loss(model(inputs), target) < task.loss(worse(inputs), target)


def test_probabilities_are_told_from_scores(place: Path) -> None:
    task = made_task(asked("models.py:Tagger", "xc.npz", "classes", hidden=8, softmax=True), None, Listener())
    scores = torch.randn(4, 3)
    target = torch.tensor([0, 1, 2, 0])
    assert task.loss is not None
    wanted = nn.functional.cross_entropy(scores, target)
    assert torch.allclose(task.loss(scores, target), wanted)
    assert torch.allclose(task.loss(scores.softmax(-1), target), wanted)


def test_arrays_go_where_they_belong(place: Path) -> None:
    scale = np.arange(COUNT, dtype=np.float32)
    cases: list[tuple[dict[str, Any], int, bool]] = [
        ({"x": X}, 1, True),
        ({"anything": X}, 1, True),
        ({"scale": scale, "x": X}, 2, True),
        ({"first": X, "second": scale}, 2, True),
        ({"x": X, "shift": np.array(0.5)}, 2, False),
    ]
    for arrays, count, by_position in cases:
        np.savez("a.npz", **arrays)
        first, *others = made_task(asked("models.py:Tagger", "a.npz"), None, Listener()).calibration()
        assert len(first) == count
        assert isinstance(first, tuple) == by_position
        x = first[0] if by_position else first["x"]
        assert x.dtype is torch.float32
        assert torch.equal(x, torch.from_numpy(X[: len(x)]).float())
        assert len(others) >= 2
    made = htcompress.convert(
        "model.pt", goal=SVD, model="models.py:Tagger", model_arguments={"hidden": 8}, calibration="a.npz"
    )
    assert made.report.quality.decomposed is not None
    np.savez("a.npz", symbols=np.arange(COUNT * 4, dtype=np.uint8).reshape(COUNT, 4) % 30)
    (symbols,), *_ = made_task(asked("models.py:Text", "a.npz"), None, Listener()).calibration()
    assert symbols.dtype is torch.int64


def test_few_samples(place: Path) -> None:
    np.savez("a.npz", x=X[:3])
    listener = Listener()
    task = made_task(asked("models.py:Tagger", "a.npz"), None, listener)
    assert len(list(task.calibration())) == 3
    assert listener.messages == ["a.npz has 3 samples: what is measured is measured on all of them."]


REFUSED: dict[str, tuple[Constructed, str]] = {
    "no class": (asked("models.py"), "is a class in a module, package.module:Class"),
    "no file": (asked("none.py:Tagger"), "There is no module file none.py"),
    "no module": (asked("no_such_module_here:Tagger"), "There is no module no_such_module_here"),
    "another class": (asked("models.py:Nothing"), "has no class Nothing; it has Tagger, TimeFirst, Text"),
    "arguments": (asked(depth=3), r"is not constructed by .*depth.*It takes \(hidden, classes=3, softmax=False\)"),
    "no model": (asked("models.py:no_module"), "made a int; expected a torch.nn.Module"),
    "no data": (asked("models.py:Tagger", "none.npz"), "There is no file none.npz"),
    "no archive": (asked("models.py:Tagger", "models.py"), "is no .npz file of plain arrays"),
    "an input more": (asked("models.py:Tagger", "xc.npz"), "holds x, classes; the model is called as forward"),
    "no targets": (asked("models.py:Tagger", "xc.npz", "none"), "has no array none; it holds x, classes"),
    "a metric": (asked("models.py:Tagger", "x.npz", "classes", "wer"), "--metric is one of accuracy, mse, mae"),
    "time first": (asked("models.py:TimeFirst"), "seems to take time first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_said(place: Path, case: str) -> None:
    given, words = REFUSED[case]
    with pytest.raises((RequestError, TaskError), match=words) as caught:
        made_task(given, None, Listener())
    assert len(str(caught.value).splitlines()) == 1


def test_shapes_are_not_broadcast(place: Path) -> None:
    np.savez("a.npz", x=X, y=np.zeros(COUNT))
    for metric in ("accuracy", "mse"):
        task = made_task(asked("models.py:Tagger", "a.npz", "y", metric), None, Listener())
        with pytest.raises(TaskError, match=f"do not compare by {metric}"):
            task.evaluate(fresh("Tagger", hidden=8))
    one = made_task(asked("models.py:Tagger", "a.npz", "y", "mse", hidden=8, classes=1), None, Listener())
    assert one.evaluate(fresh("Tagger", hidden=8, classes=1))["mse"] > 0


def test_commands(htc: Command, place: Path) -> None:
    options = ["--model", "models:Tagger", "--model-arguments", '{"hidden": 8}', "--calibration", "xc.npz"]
    options += ["--targets", "classes"]
    fast = ("--layout", "svd", "--steps", 1, "-q")
    made = htc("convert", "model.pt", "--budget", 300, *options, *fast, "-o", "out", "--json")
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert report["quality"]["metric"] == "accuracy"
    assert report["quality"]["dense"] == 1.0
    again = Request.of_report(report["request"])
    assert again.model == Constructed("models:Tagger", {"hidden": 8}, "xc.npz", "classes")
    assert "--model models:Tagger --model-arguments '{\"hidden\": 8}'" in again.command("model.pt")
    for command in (["evaluate", "out"], ["finetune", "out", "--steps", 1, "-q"]):
        # What it was made with is told, not run unasked.
        refused = htc(*command)
        assert refused.code == 2
        assert "--model models:Tagger --model-arguments" in " ".join(refused.err.split())
        assert htc(*command, *options).code == 0
    assert htc("check", "out", "--max-parameters", 300).code == 0
    assert htc("evaluate", "model.pt", *options).out == "accuracy  1\n"
    nothing = htc("evaluate", "model.pt", *options[:-2])
    assert nothing.code == 2
    assert "holds x, classes" in nothing.err
    for wrong in (
        ["--model-arguments", "{}"],
        [*options, "--task", "task.py"],
        ["--model", "a:B", "--model-arguments", "["],
    ):
        assert htc("convert", "model.pt", "--budget", 300, *wrong).code == 2


@pytest.mark.full
def test_a_directory_without_targets_is_measured_against_its_checkpoint(place: Path, htc: Command) -> None:
    options = ["--model", "models.py:Tagger", "--model-arguments", '{"hidden": 8}', "--calibration", "x.npz"]
    made = htc("convert", "model.pt", "--budget", 300, *options, "--no-finetune", "--layout", "svd", "-q", "-o", "out")
    assert made.code == 0, made.err
    name, value = htc("evaluate", "out", *options).out.split()
    report = htcompress.read_report("out")
    assert name == "output_error"
    assert float(value) == pytest.approx(report.quality.decomposed, rel=1e-4)
    nothing = htc("evaluate", "model.pt", *options)
    assert nothing.code == 2
    assert "Give --targets NAME" in " ".join(nothing.err.split())
    (place / "model.pt").rename(place / "moved.pt")
    lost = htc("evaluate", "out", *options)
    assert lost.code == 2
    assert "dense checkpoint model.pt" in " ".join(lost.err.split())
    assert htc("finetune", "out", *options, "--steps", 1, "-q", "--teacher", "moved.pt").code == 0


def test_reports_that_are_not_true(place: Path) -> None:
    request = Request(SVD, model=asked()).to_report()
    assert Request.of_report(request).model == asked()
    for wrong in ({}, {"name": 3, "arguments": "{}"}, {"name": "a", "arguments": "["}, {"name": "a", "arguments": "3"}):
        with pytest.raises(RequestError):
            Request.of_report({**request, "model": wrong})
    with pytest.raises(RequestError):
        Request.of_report({**request, "names": {"a": 3}})
    with pytest.raises(CheckpointError):
        htcompress.convert("none.pt", goal=SVD, model="models.py:Tagger", model_arguments={"hidden": 8})

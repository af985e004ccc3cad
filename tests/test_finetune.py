"""finetune and evaluate: output directories taken up again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import distance
from small import Listener, clips, save_tagger, tagger, write_task
from torch import nn

import htcompress
from htcompress.directory.read import load
from htcompress.errors import CheckpointError, TaskError
from htcompress.finetuning.distill import distill
from htcompress.report import read_report
from htcompress.request import FineTuning, Goal
from htcompress.vocabulary import LayoutKind, UnitOrder

SVD = Goal(budget=400, layout=LayoutKind.SVD)
"""A goal that is planned fast; what is tested here does not depend on the layout."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tagger(tmp_path / "model.pt")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "task.py")


@pytest.fixture
def written(tmp_path: Path, checkpoint: Path) -> Path:
    """A checkpoint converted without a task."""
    htcompress.save(htcompress.convert(checkpoint, goal=SVD), tmp_path / "out")
    return tmp_path / "out"


def test_evaluate_a_checkpoint_and_a_directory(checkpoint: Path, task: Path, written: Path) -> None:
    expected = htcompress.convert(checkpoint, goal=SVD, task=task)
    assert htcompress.evaluate(checkpoint, task=task) == expected.report.quality.metrics["dense"]
    htcompress.save(expected, written)
    assert htcompress.evaluate(str(written), task=str(task)) == expected.report.quality.metrics["decomposed"]


def test_evaluate_needs_a_metric(checkpoint: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py", "del evaluate")
    with pytest.raises(TaskError, match=r"lacks evaluate\(\), which evaluation needs"):
        htcompress.evaluate(checkpoint, task=task)


def test_finetune_a_directory(written: Path, task: Path) -> None:
    before = read_report(written)
    listener = Listener()
    made = htcompress.finetune(written, task=task, options=FineTuning(steps=60), observer=listener)
    assert read_report(written) == before
    assert listener.messages == []
    htcompress.save(made, written)
    after = read_report(written)
    assert after.totals == before.totals
    assert after.source == before.source
    assert after.quality.dense == htcompress.evaluate(written.parent / "model.pt", task=task)["accuracy"]
    assert after.quality.finetuned == htcompress.evaluate(written, task=task)["accuracy"]
    assert after.quality.decomposed is not None
    assert after.timings_s.finetune is not None
    again = htcompress.finetune(written, task=task, options=FineTuning(steps=2))
    assert again.report.timings_s.finetune >= after.timings_s.finetune
    assert again.report.quality.decomposed == after.quality.decomposed


def test_states_in_another_order_are_taught_in_their_own(
    checkpoint: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = Goal(budget=400, layout=LayoutKind.SPLIT, units=UnitOrder.READERS)
    made = htcompress.convert(checkpoint, goal=goal, task=task, finetuning=None)
    assert [layer.units_reordered for layer in made.report.layers] == [True]
    plain = htcompress.convert(checkpoint, goal=SVD, task=task, finetuning=None)
    assert [layer.units_reordered for layer in plain.report.layers] == [False]
    htcompress.save(made, tmp_path / "out")
    model = load(tmp_path / "out", tagger())
    assert distance(model(clips(5)), made.model(clips(5))) < 1e-6
    apart: list[tuple[float, float]] = []

    def watched(student: nn.Module, teacher: nn.Module, *arguments: Any, places: Any, **others: Any) -> Any:
        found, wanted = student.rnn(clips(5))[0], teacher.rnn(clips(5))[0]
        apart.append((distance(found.index_select(-1, places["rnn"]), wanted), distance(found, wanted)))
        return distill(student, teacher, *arguments, places=places, **others)

    monkeypatch.setattr("htcompress.stages.distill", watched)
    htcompress.finetune(tmp_path / "out", task=task, options=FineTuning(steps=2))
    ((own, moved),) = apart
    assert own < 0.7 * moved


def test_finetune_keeps_tensors_that_the_model_does_not_know(tmp_path: Path, task: Path) -> None:
    path = save_tagger(tmp_path / "model.pt", ema=torch.ones(2))
    htcompress.save(htcompress.convert(path, goal=SVD), tmp_path / "out")
    listener = Listener()
    made = htcompress.finetune(tmp_path / "out", task=task, options=FineTuning(steps=2), observer=listener)
    assert torch.equal(made.tensors["ema"], torch.ones(2))
    assert f"1 tensors of {tmp_path / 'out'} are unknown to model(): ema." in listener.messages
    assert htcompress.evaluate(tmp_path / "out", task=task)


def test_the_teacher_is_found_where_the_directory_was_made_from(
    tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "results").mkdir()
    save_tagger(tmp_path / "runs" / "model.pt")
    monkeypatch.chdir(tmp_path)
    made = htcompress.convert("runs/model.pt", goal=SVD)
    htcompress.save(made, "results/out")
    assert read_report(Path("results/out")).source["path"] == os.path.join("..", "..", "runs", "model.pt")
    pure = write_task(tmp_path / "pure.py", "del loss, training, evaluate")
    listener = Listener()
    monkeypatch.chdir(tmp_path / "runs")
    tuned = htcompress.finetune("../results/out", task=pure, options=FineTuning(steps=2), observer=listener)
    assert listener.messages == []
    htcompress.save(tuned, "elsewhere/out")
    assert read_report(Path("elsewhere/out")).source["path"] == os.path.join("..", "..", "model.pt")
    # Moved together, they still find each other.
    shutil.move(tmp_path / "runs", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    htcompress.finetune("kept/elsewhere/out", task=pure, options=FineTuning(steps=2), observer=listener)
    assert listener.messages == []


def test_a_teacher_that_is_gone(written: Path, task: Path, tmp_path: Path) -> None:
    moved = shutil.move(written.parent / "model.pt", tmp_path / "elsewhere.pt")
    listener = Listener()
    made = htcompress.finetune(written, task=task, options=FineTuning(steps=2), observer=listener)
    assert listener.messages[:1] == ["The dense checkpoint model.pt is not found: training on the task's loss alone."]
    assert made.report.quality.dense is None
    bare = write_task(tmp_path / "bare.py", "del loss")
    with pytest.raises(TaskError, match=r"model.pt that .*out was made from is not found, .* with --teacher"):
        htcompress.finetune(written, task=bare)
    given = htcompress.finetune(written, task=bare, teacher=moved, options=FineTuning(steps=2))
    assert given.report.quality.dense is not None


def test_a_teacher_that_has_changed_is_not_used(written: Path, task: Path) -> None:
    save_tagger(written.parent / "model.pt", seed=1)
    listener = Listener()
    htcompress.finetune(written, task=task, options=FineTuning(steps=2), observer=listener)
    assert "is no longer the checkpoint that" in listener.messages[0]


def test_a_model_compressed_in_memory_has_no_teacher_to_be_found(tmp_path: Path, task: Path) -> None:
    htcompress.save(htcompress.compress(tagger(), budget=400, layout="svd"), tmp_path / "out")
    listener = Listener()
    htcompress.finetune(tmp_path / "out", task=task, options=FineTuning(steps=2), observer=listener)
    assert listener.messages[:1] == ["The dense checkpoint Tagger is not found: training on the task's loss alone."]


def test_finetune_without_a_metric_forgets_the_old_one(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    htcompress.save(htcompress.convert(checkpoint, goal=SVD, task=task), tmp_path / "out")
    bare = write_task(tmp_path / "bare.py", "del evaluate")
    listener = Listener()
    made = htcompress.finetune(tmp_path / "out", task=bare, options=FineTuning(steps=2), observer=listener)
    assert made.report.quality.final is None
    assert made.report.quality.dense is not None
    assert "has no evaluate(): the fine-tuned model is not measured" in listener.messages[0]


def test_finetune_with_another_metric_does_not_mix_them(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    htcompress.save(htcompress.convert(checkpoint, goal=SVD, task=task), tmp_path / "out")
    other = write_task(
        tmp_path / "other.py", "def evaluate(model):\n    return {'loss': 7.0}", "higher_is_better = False"
    )
    quality = htcompress.finetune(tmp_path / "out", task=other, options=FineTuning(steps=2)).report.quality
    assert (quality.metric, quality.higher_is_better) == ("loss", False)
    assert (quality.dense, quality.decomposed, quality.finetuned) == (7.0, None, 7.0)
    assert set(quality.metrics) == {"dense", "finetuned"}


def test_finetune_needs_data(written: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py", "del calibration, training")
    with pytest.raises(TaskError, match=r"lacks training\(\), which fine-tuning needs"):
        htcompress.finetune(written, task=task)


@pytest.mark.parametrize("source", ["none", "model.pt"])
def test_finetune_of_what_is_no_directory(checkpoint: Path, task: Path, source: str) -> None:
    with pytest.raises(CheckpointError, match=f"{source}.*htcompress"):
        htcompress.finetune(checkpoint.parent / source, task=task)

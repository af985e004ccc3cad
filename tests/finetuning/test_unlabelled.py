"""Inputs without targets stand between those with: every one comes up, and a pass is a pass over those with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Listener, Outcome, clips, save_tagger, tagger, write_task
from torch import Tensor
from torch.nn import functional

import htcompress
from htcompress.data import alternating
from htcompress.finetuning.objective import Objective
from htcompress.request import FineTuning

TASK = """
SEEN = open("seen.txt", "a")

def unlabelled():
    for x in (torch.zeros(2, 6, 24), torch.ones(2, 6, 24)):
        print("one", file=SEEN, flush=True)
        yield x
"""


def counted(name: str, count: int) -> Callable[[], Iterator[tuple[tuple[Any, ...], Any]]]:
    return lambda: iter([((f"{name}{i}",), None) for i in range(count)])


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "wanted"),
    [
        (3, 2, ["a0 b0 a1 b1 a2 b0", "a0 b1 a1 b0 a2 b1"]),
        (2, 5, ["a0 b0 a1 b1", "a0 b2 a1 b3", "a0 b4 a1 b0"]),
        (2, 0, ["a0 a1", "a0 a1"]),
        (0, 2, ["", ""]),
    ],
)
def test_one_after_each(labelled: int, unlabelled: int, wanted: list[str]) -> None:
    passes = alternating(counted("a", labelled), counted("b", unlabelled))
    assert [" ".join(a[0] for a, _ in passes()) for _ in wanted] == wanted


def test_targets_are_for_labelled_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = [(clips(seed), torch.full((len(clips(seed)),), seed)) for seed in range(4)]
    unlabelled = [clips(seed) for seed in range(10, 13)]
    taught: list[tuple[float, Any]] = []
    original = Objective.__call__

    def watched(self: Objective, arguments: Any, target: Any, **more: Any) -> Tensor:
        if torch.is_grad_enabled():
            taught.append((float(arguments[0].sum()), target))
        return original(self, arguments, target, **more)

    monkeypatch.setattr(Objective, "__call__", watched)
    htcompress.compress(
        tagger(),
        budget=400,
        calibration=unlabelled,
        training=labelled,
        unlabelled=unlabelled,
        loss=lambda output, target: functional.cross_entropy(output, target % output.shape[1]),
        finetuning=FineTuning(steps=14, held_out=1),
    )
    with_target = {total for total, target in taught if target is not None}
    assert with_target == {float(x.sum()) for x, _ in labelled[1:]}
    assert {total for total, target in taught if target is None} == {float(x.sum()) for x in unlabelled}


def test_a_task_may_have_them(tmp_path: Path, htc: Callable[..., Outcome]) -> None:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py", TASK)
    ended = htc("convert", "model.pt", "--budget", "400", "--task", "task.py", "--steps", "6", "-o", "out")
    assert ended.code == 0, ended.err
    assert (tmp_path / "seen.txt").read_text().count("one") >= 3
    (tmp_path / "model.pt").unlink()
    listener = Listener()
    # Without the dense model nobody says what they should be answered with.
    made = htcompress.finetune(
        tmp_path / "out", task=tmp_path / "task.py", options=FineTuning(steps=2), observer=listener
    )
    assert any("not found" in message for message in listener.messages)
    assert made.report.quality.finetuned is not None

"""A run that is stopped anywhere and goes on ends where one that was not stopped does, to the last bit."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import Tagger, clips, equal, tagger
from torch import Tensor, nn

import htcompress
from htcompress.errors import CheckpointError, RequestError
from htcompress.finetuning.checkpoints import Checkpoints, Saved, random_facts, random_state
from htcompress.finetuning.distill import distill
from htcompress.finetuning.standing import Progress
from htcompress.isolation import RandomState
from htcompress.request import FineTuning


class StoppedError(Exception):
    """What ends a run here as a signal would."""


def noise() -> Iterator[Any]:
    """Passes of batches drawn from the generators of torch and NumPy."""
    for _ in range(9):
        yield (torch.randn(8, 5, 24) + float(np.random.rand()),), None


def louder() -> Iterator[Any]:
    """The same, drawn from Python's generator as well, from which the shape checks of the tests draw too."""
    for (x,), target in noise():
        yield (x + random.random(),), target


class Drawing(Tagger):
    """Draws at random while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """A student and its teacher."""
    torch.manual_seed(0)
    dense: nn.Module = Drawing().eval() if kind == "drawing" else tagger()
    if kind == "half":
        dense = dense.bfloat16()
    goal: dict[str, Any] = {"budget": 900, "bits": 4} if kind == "rounded" else {"budget": 400, "layout": "svd"}
    made = htcompress.compress(dense, **goal).model
    assert made is not None
    return made, dense


def halves() -> Iterator[Any]:
    for (x,), target in noise():
        yield (x.bfloat16(),), target


def run(
    models: tuple[nn.Module, nn.Module],
    options: FineTuning,
    checkpoints: Checkpoints | None = None,
    *,
    stop: int | None = None,
    kind: str = "",
) -> tuple[dict[str, Any], list[Progress]]:
    """Fine-tune a copy of the student, stopped at some step of the optimiser if asked for."""
    student, teacher = models[0], models[1]
    student = copy.deepcopy(student)
    step, left = torch.optim.AdamW.step, [stop]

    def watched(self: torch.optim.AdamW, *arguments: Any) -> Any:
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                raise StoppedError
        return step(self, *arguments)

    torch.optim.AdamW.step = watched  # type: ignore[method-assign]
    try:
        batches = {"half": halves, "drawing": louder}.get(kind, noise)
        history = distill(student, teacher, batches, options=options, checkpoints=checkpoints)
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    return student.state_dict(), history


CASES = {
    "plain": FineTuning(steps=30, check_every=5),
    "half": FineTuning(steps=30, check_every=5),
    "rounded": FineTuning(steps=30, check_every=5),
    "drawing": FineTuning(steps=30, check_every=5),
    "backtracking": FineTuning(steps=30, check_every=2, patience=2, learning_rate=1.0),
    "stages": FineTuning(check_every=5),
    "accumulating": FineTuning(epochs=7, check_every=3, accumulate=2),
    "bfloat16": FineTuning(steps=30, check_every=5, mixed_precision="bf16"),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_stopped_run_ends_where_another_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htcompress.finetuning.distill._STAGE", 5)
    monkeypatch.setattr("htcompress.finetuning.distill._PASSES", 100)
    monkeypatch.setattr("htcompress.finetuning.distill._GAIN", -1.0)
    models, options = pair(kind), CASES[kind]
    state, history = run(models, options, Checkpoints(tmp_path / "whole", 7), kind=kind)
    taken = history[-1].step
    assert taken > 24
    folder = tmp_path / "stopped"
    for stop in (16, 5, taken - 15):  # the second before there is a new checkpoint
        with pytest.raises(StoppedError):
            run(models, options, Checkpoints(folder, 7, resume=True), stop=stop, kind=kind)
    found, again = run(models, options, Checkpoints(folder, resume=True), kind=kind)
    assert again == history
    assert equal(*({n: t for n, t in one.items() if isinstance(t, Tensor)} for one in (found, state)))
    if kind != "drawing":  # which draws between the draws of its data
        plain, once = run(models, options, kind=kind)
        assert once == history
        assert equal(*({n: t for n, t in one.items() if isinstance(t, Tensor)} for one in (plain, state)))


def test_the_time_limit_counts_what_was_spent_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("htcompress.finetuning.distill.time.monotonic", lambda: float(next(clock)))
    models, options = pair("plain"), FineTuning(steps=1000, time_limit=40, check_every=100)
    _, whole = run(models, options)
    with pytest.raises(StoppedError):
        run(models, options, Checkpoints(tmp_path, 5), stop=23)
    _, history = run(models, options, Checkpoints(tmp_path, 5, resume=True))
    assert 30 <= whole[-1].step <= 40
    # Checkpoints look at the clock, too, and this one goes on by being looked at.
    assert 25 <= history[-1].step <= whole[-1].step


# ---- what does not fit --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    with pytest.raises(StoppedError):
        run(pair("plain"), CASES["plain"], Checkpoints(tmp_path / "run", 5), stop=13)
    return tmp_path / "run"


def test_a_checkpoint_is_one_file_of_plain_tensors(stopped: Path) -> None:
    (file,) = stopped.iterdir()
    saved = Saved.of_bytes(file.read_bytes(), file)
    assert saved.facts["standing"]["step"] == 10
    assert set(saved.under("model.")) == set(tagger().state_dict()) - {
        n for n in tagger().state_dict() if n.startswith("rnn")
    } | {n for n in pair("plain")[0].state_dict() if n.startswith("rnn") and "extra" not in n}
    assert {name.split(".")[2] for name in saved.tensors if name.startswith("optimizer")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


def test_a_run_that_has_not_ended_is_not_begun_anew_by_mistake(stopped: Path) -> None:
    with pytest.raises(RequestError, match=r"of a run that has not ended. Go on with --resume, or remove it"):
        run(pair("plain"), CASES["plain"], Checkpoints(stopped, 5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (FineTuning(steps=31, check_every=5), "of a run with steps 30; found 31"),
        (FineTuning(steps=30, check_every=5, clip=2.0), "of a run with clip 1.0; found 2.0"),
        (FineTuning(steps=30, check_every=5, accumulate=3), "of a run with batches of a step 1; found 3"),
    ],
)
def test_another_run_does_not_go_on_from_it(stopped: Path, options: FineTuning, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        run(pair("plain"), options, Checkpoints(stopped, 5, resume=True))


def test_another_model_or_other_data_do_not_go_on_from_it(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair("plain")
    with torch.no_grad():
        student.get_parameter("head.bias").add_(1.0)
    with pytest.raises(CheckpointError, match="of a run with another model"):
        run((student, teacher), CASES["plain"], Checkpoints(stopped, 5, resume=True))
    others = [((clips(i),), None) for i in range(9)]
    with pytest.raises(CheckpointError, match="of a run with other batches held out"):
        distill(
            pair("plain")[0],
            teacher,
            lambda: iter(others),
            options=CASES["plain"],
            checkpoints=Checkpoints(stopped, resume=True),
        )


@pytest.mark.parametrize("content", [b"", b"no tensors", "half", "other"])
def test_what_is_no_checkpoint(stopped: Path, content: bytes | str) -> None:
    (file,) = stopped.iterdir()
    if content == "half":
        content = file.read_bytes()[:-100]
    elif content == "other":
        content = Saved({"schema": "htcompress.checkpoint/9"}, {}).to_bytes()
    assert isinstance(content, bytes)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors (is no checkpoint|was written by another)"):
        run(pair("plain"), CASES["plain"], Checkpoints(stopped, 5, resume=True))


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cannot be written: .*--checkpoint"):
        run(pair("plain"), CASES["plain"], Checkpoints(tmp_path / "file" / "in", 5))
    with pytest.raises(RequestError, match="every so many steps, at least 1; found 0"):
        Checkpoints(tmp_path, 0)


def test_removing_leaves_what_is_not_ours(stopped: Path) -> None:
    (stopped / ".checkpoint.safetensors.1.partial").write_text("")
    (stopped / "notes").write_text("")
    Checkpoints(stopped).remove()
    assert [path.name for path in stopped.iterdir()] == ["notes"]
    (stopped / "notes").unlink()
    Checkpoints(stopped).remove()
    assert not stopped.exists()
    Checkpoints(stopped).remove()


def test_random_states_survive_json() -> None:
    np.random.randn(1)  # which leaves half of a pair
    random.gauss(0, 1)
    state = RandomState.now()
    facts = json.loads(json.dumps(random_facts(state)))

    def drawn() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()]

    expected = drawn()
    random_state(facts).restore()
    assert drawn() == expected

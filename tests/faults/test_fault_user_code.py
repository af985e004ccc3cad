"""Faults of kind 1: what the user's code does outlives it, or what it finds is not what it left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_models import compact, near
from small import Tagger, clips, save_tagger, tagger, write_task
from torch import Tensor, nn

import htcompress
from htcompress.errors import CheckpointError, TaskError
from htcompress.request import FineTuning, Goal


class Normed(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def test_1_an_evaluation_that_trains_changes_nobody(tmp_path: Path) -> None:
    model = Normed().eval()
    before = copy.deepcopy(model.state_dict())

    def evaluate(given: nn.Module) -> float:
        given.train()
        value = float(given(clips()).detach().square().mean())
        given.train()
        return value

    result = htcompress.compress(model, budget=300, calibration=[clips()], evaluate=evaluate, higher_is_better=True)
    assert result.model is not None
    assert not any(module.training for module in (*model.modules(), *result.model.modules()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(result.model.norm.running_mean, before["norm.running_mean"])
    htcompress.save(result, tmp_path / "out")
    assert torch.equal(htcompress.load(tmp_path / "out", Normed().eval())(clips()), result.model(clips()))


def test_1_what_a_task_leaves_behind(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py", "torch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)")
    task.write_text(task.read_text().replace("generator=generator)", "generator=generator, dtype=torch.float32)", 1))
    text = task.read_text().replace("return Tagger()", "return Tagger().float()")
    task.write_text(text)
    made = htcompress.convert(
        save_tagger(tmp_path / "model.pt"), goal=Goal(budget=300), task=task, finetuning=FineTuning(steps=3)
    )
    assert made.report.quality.finetuned is not None
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_1_the_process_is_as_it_was() -> None:
    def evaluate(model: nn.Module) -> float:
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_grad_enabled(False)
        return float(torch.rand(()))

    threads, model = torch.get_num_threads(), tagger()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made = htcompress.compress(model, budget=300, calibration=[clips()], evaluate=evaluate)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    # The same draws for every stage.
    assert made.report.quality.dense == made.report.quality.decomposed


class Streaming(nn.Module):
    """Keeps its state from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(24, 8, batch_first=True)
        self.hidden: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out, self.hidden = self.rnn(x, self.hidden)
        self.attention = out.softmax(-1)
        return out


def test_1_states_that_a_forward_keeps() -> None:
    model = Streaming().eval()
    data = [clips(seed) for seed in range(4)]
    result = htcompress.compress(
        model, budget=300, calibration=data, training=data, finetuning=FineTuning(steps=4, check_every=2)
    )
    assert result.model is not None
    assert model.hidden is None
    assert result.model.hidden is None
    full = compact(model, calibration=data)
    for x in data:
        assert near(full(x), model(x))


class Idioms(Tagger):
    """What models do in training alone: another head, the loss in place of an answer, noise, teacher forcing."""

    def __init__(self, idiom: str) -> None:
        super().__init__()
        self.idiom = idiom

    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        if not self.training:
            return found
        if self.idiom == "noise":
            return nn.functional.dropout(found, 0.5, self.training)
        return {"head": (found, found), "loss": found.square().mean(), "shorter": found[:, :1]}[self.idiom]


@pytest.mark.parametrize("idiom", ["head", "loss", "shorter", "noise"])
def test_22_only_answers_in_evaluation_mode_count(idiom: str) -> None:
    made = []
    for model in (Idioms(idiom), Tagger()):
        torch.manual_seed(0)
        data = [clips(seed) for seed in range(6)]
        model.load_state_dict(tagger().state_dict())
        result = htcompress.compress(
            model, budget=500, calibration=data, training=data, finetuning=FineTuning(steps=12)
        )
        assert result.model is not None
        made.append(result.model(clips(9)))
    assert torch.equal(*made)


class Silent(Tagger):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


def test_22_answers_without_gradients_are_told() -> None:
    data = [clips(seed) for seed in range(6)]
    with pytest.raises(TaskError, match="in evaluation mode have no gradients"):
        htcompress.compress(Silent(), budget=500, training=data)


def test_22_numbers_of_the_models_own_making() -> None:
    """The data are sound: it is a buffer, as batch normalisation leaves it when training has diverged."""
    model = nn.Sequential(nn.BatchNorm1d(5), nn.LSTM(24, 8, batch_first=True))
    model[0].running_mean[1] = float("nan")
    with pytest.raises(CheckpointError, match=r"0\.running_mean has 1 of 5 values"):
        htcompress.compress(model, budget=500, calibration=[clips()])
    model[0].running_mean[1] = 0.0
    model[0].running_var[1] = -1.0
    with pytest.raises(TaskError, match="the model puts numbers that are not finite into 1, though the batch is"):
        htcompress.compress(model, budget=500, calibration=[clips()])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"layout": "svd"}, {"unit_order": "keep"}, {"format": "dense"}])
def test_22_data_that_are_no_numbers_are_told_by_their_batch(number: float, options: dict[str, Any]) -> None:
    data = [clips(seed) for seed in range(4)]
    data[2][1, 3, 0] = number
    with pytest.raises(TaskError, match=r"Batch 3 of calibration\(\) brings numbers that are not finite into rnn"):
        htcompress.compress(Tagger(), budget="2kB", calibration=data, **options)


@pytest.mark.parametrize(
    ("name", "evaluated"), [("rnn.weight_hh_l0", True), ("rnn.weight_hh_l0", False), ("head.bias", True)]
)
def test_22_weights_that_are_no_numbers_are_named(name: str, evaluated: bool) -> None:
    """And not the metric or the data, which are what they spoil."""
    model = Tagger()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[2] = float("nan")
    asked: dict[str, Any] = {"evaluate": lambda m: float(m(clips()).mean().detach())} if evaluated else {}
    with pytest.raises(CheckpointError, match=rf"{name} has 1 of \d+ values that are NaN or infinite"):
        htcompress.compress(model, budget="2kB", calibration=[clips()], **asked)

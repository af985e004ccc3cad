"""Models whose answers are unlike others': a number for a whole batch beside them, complex ones, drawn ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import htcompress
from htcompress.errors import TaskError
from htcompress.finetuning.distill import distill
from htcompress.finetuning.objective import Objective
from htcompress.observer import Observer
from htcompress.request import FineTuning
from htcompress.values import answers_in


class Answering(nn.Module):
    """A layer whose answers are given in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.rnn, self.head, self.how = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 4), how

    def forward(self, x: Tensor) -> Any:
        states, _ = self.rnn(x)
        scores = self.head(states)
        mean, width = scores.chunk(2, -1)
        return {
            "plain": lambda: scores,
            "penalty": lambda: (scores, states.square().mean()),
            "complex": lambda: torch.complex(mean, width),
            "sampled": lambda: mean + nn.functional.softplus(width) * torch.randn_like(mean),
            "one": lambda: scores[:, -1, :1],
        }[self.how]()


def model(how: str) -> Answering:
    torch.manual_seed(0)
    return Answering(how).eval()


def clips(count: int = 4, batch: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 7, 12, generator=generator) for _ in range(count)]


def test_which_answers_are_compared() -> None:
    values = torch.randn(3, 2), torch.tensor(0.5), torch.randn(3, dtype=torch.complex64), torch.arange(3)
    assert [tuple(t.shape) for t in answers_in(values)] == [(3, 2), (3, 2)]
    assert [tuple(t.shape) for t in answers_in((torch.tensor(0.5), torch.arange(3)))] == [()]
    assert torch.equal(answers_in(values[2].conj())[0][:, 1], -values[2].imag)


def test_a_number_for_the_whole_batch_is_no_answer_beside_others() -> None:
    """A penalty that hardly varies weighed more than all that the model answers."""
    found = [
        htcompress.compress(model(how), budget=700, calibration=clips()).modules["rnn"] for how in ("plain", "penalty")
    ]
    for a, b in zip(*(m.parameters() for m in found), strict=True):
        assert torch.equal(a, b)
    errors = []
    for how in ("plain", "penalty"):
        student = htcompress.compress(model(how), budget=700, calibration=clips()).model
        assert student is not None
        objective = Objective(student, model(how), None, hidden=0.5)
        errors.append(float(objective((clips()[0],), None)))
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_complex_answers_are_real_ones_in_pairs() -> None:
    found = []
    for how in ("plain", "complex"):
        torch.manual_seed(0)
        result = htcompress.compress(model(how), budget=700, calibration=clips())
        found.append([m.error["outputs"] for m in result.report.layers[0].matrices])
    assert found[0] == pytest.approx(found[1], rel=0.3)
    student = htcompress.compress(model("complex"), budget=300, calibration=clips()).model
    assert student is not None
    history = distill(
        student, model("complex"), lambda: iter([((x,), None) for x in clips()]), options=FineTuning(steps=80)
    )
    assert history[-1].best < history[0].best


def test_both_models_draw_alike() -> None:
    """Where they draw apart, it is best not to be spread at all."""
    teacher, x = model("sampled"), clips()[0]
    objective = Objective(model("sampled"), teacher, None, hidden=0.5)
    assert float(objective((x,), None).detach()) == 0.0
    assert objective.distance((x,), objective.answer((x,))) == 0.0
    # Others for other batches, and nobody else's numbers.
    before = torch.get_rng_state()
    one, other = (objective.answer((x + k,)) for k in (0.0, 1e-7))
    assert not torch.allclose(one, other, atol=1e-2)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_of_one_number_are_measured_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = model("one")
    student = htcompress.compress(teacher, budget=600, calibration=clips()).model
    assert student is not None
    single = clips(24, batch=1)
    history = distill(
        student, teacher, lambda: iter([((x,), None) for x in single]), options=FineTuning(steps=40, hidden=0.0)
    )
    answers = torch.cat([teacher(x) for x in single]).detach()
    with torch.no_grad():
        apart = torch.cat([student(x) for x in single]) - answers
    share = float(apart.square().mean() / answers.var())
    # Held out are a few of these; that they are in the same unit is what matters.
    assert 0.2 * share < history[-1].best < 10 * share
    assert history[0].loss < 100


def test_a_pass_that_cannot_begin_again_is_told_from_one_without_end() -> None:
    teacher = model("plain")
    student = htcompress.compress(teacher, budget=700, calibration=clips()).model
    assert student is not None
    once: Iterator[Any] = iter([((x,), None) for x in clips(12)])
    with pytest.raises(TaskError, match="a generator can be read only once"):
        distill(student, teacher, lambda: once, options=FineTuning(epochs=2))


class Frozen(nn.Module):
    """An encoder that is used without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.LSTM(12, 16, batch_first=True), nn.GRU(16, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            states, _ = self.encoder(x)
        return self.rnn(states)[0]


class Told(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_a_layer_without_gradients_is_weighed_by_what_enters_it() -> None:
    torch.manual_seed(0)
    dense, told = Frozen().eval(), Told()
    mixing = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    # What enters has three directions; the weights alone do not tell.
    data = [x[..., :3] @ mixing for x in clips(8, 16)]
    result = htcompress.compress(dense, ratio=3, layout="svd", calibration=data, observer=told)
    assert [message for message in told.messages if message.startswith("No gradient comes back to encoder")]
    assert not [message for message in told.messages if "to rnn" in message]
    assert result.model is not None
    x = clips(9, 16)[-1][..., :3] @ mixing
    alone = htcompress.compress(dense.encoder, ratio=3, layout="svd").model
    assert alone is not None
    with torch.no_grad():
        wanted, found, blind = (encoder(x)[0] for encoder in (dense.encoder, result.model.encoder, alone))
    assert float((found - wanted).norm()) < 0.5 * float((blind - wanted).norm())


class Outputs(nn.Module):
    """What a layer puts out, without its last state."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def test_what_is_lost_is_told_by_few_steps_as_by_many() -> None:
    """A dozen gradients span a dozen rows: whatever errs in the others seemed to cost nothing."""
    torch.manual_seed(0)
    dense, told = nn.Sequential(Outputs(nn.LSTM(600, 32, batch_first=True)), nn.Linear(32, 8)).eval(), Told()
    generator = torch.Generator().manual_seed(1)
    fresh, *few = (torch.randn(n, 6, 600, generator=generator) for n in (256, 1, 1))
    with torch.no_grad():
        wanted = dense(fresh)

    def lost(model: nn.Module | None) -> float:
        assert model is not None
        with torch.no_grad():
            return float((model(fresh) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())

    result = htcompress.compress(dense, budget="40kB", calibration=few, observer=told)
    assert [
        message for message in told.messages if message.startswith("The calibration data has 12 time steps for the 632")
    ]
    said = max(m.error["outputs"] for m in result.report.layers[0].matrices)
    assert lost(result.model) < 4 * said**2 + 0.02
    assert lost(result.model) < 1.5 * lost(
        htcompress.compress(dense, budget="40kB", format="dense", calibration=few).model
    )

"""What is held out: batches without a loss, and models that keep states from one call to the next."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import CLASSES, HIDDEN, INPUTS, Listener, clips, tagger
from torch import Tensor, nn
from torch.nn import functional

import htcompress
from htcompress.finetuning.distill import distill
from htcompress.finetuning.held import HeldOut
from htcompress.finetuning.objective import Objective
from htcompress.finetuning.standing import Progress
from htcompress.finetuning.stream import Share
from htcompress.finetuning.together import Alone
from htcompress.model.statistics import collect
from htcompress.nn.states import cut_off
from htcompress.request import FineTuning
from htcompress.stages import tell_if_in_vain

IGNORED = -100


def batches(ignored: set[int], count: int = 12) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """With all targets left out of some batches, whose mean loss is no number."""
    for index in range(count):
        x = clips(20 + index, batch=8)
        target = tagger()(x).argmax(1)
        yield (x,), torch.full_like(target, IGNORED) if index in ignored else target


def loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, ignore_index=IGNORED)


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("ignored", [{0}, {1, 5}, {0, 1, 2, 3}])
def test_batches_without_a_loss_do_not_stop_the_others(ignored: set[int], taught: bool) -> None:
    student = htcompress.compress(tagger(), budget=400).model
    teacher = tagger() if taught else None
    options = FineTuning(steps=60, check_every=10, held_out=4)
    history = distill(student, teacher, lambda: batches(ignored), loss=loss, options=options)
    assert all(bool(torch.isfinite(p).all()) for p in student.parameters())
    if taught or ignored != {0, 1, 2, 3}:
        assert history[-1].unmeasured > 0
        assert history[-1].best < 0.97 * history[0].loss < math.inf
    else:
        assert history[-1].best == math.inf


def test_a_loss_that_the_student_alone_has_not_counts() -> None:
    """Where the teacher's answers have one, a student without one is worse for it."""
    teacher = tagger()

    def broken(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target) if torch.equal(output, teacher(x)) else torch.tensor(math.inf)

    ((x,), target), *_ = batches(set())
    student = htcompress.compress(tagger(), budget=400).model
    objective = Objective(student, teacher, broken, hidden=0.0)
    assert not bool(torch.isfinite(objective((x,), target)))
    assert objective.unmeasured == 0


def test_that_no_batch_has_a_loss_is_said() -> None:
    listener = Listener()
    tell_if_in_vain([[Progress(0, 9, math.inf, math.inf), Progress(9, 9, math.inf, math.inf)]], listener)
    assert "no finite number" in listener.messages[0]
    assert "loss()" in listener.messages[0]


class Streaming(nn.Module):
    """Goes on from the state of the call before, which it keeps in an attribute or a buffer."""

    def __init__(self, place: str, detached: bool = True) -> None:
        super().__init__()
        self.place, self.detached = place, detached
        self.cell, self.head = nn.LSTMCell(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.state: Any = None
        self.register_buffer("h", torch.zeros(8, HIDDEN))
        self.register_buffer("c", torch.zeros(8, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        state = (self.h, self.c) if self.place == "buffer" else self.state
        for step in x.unbind(1):
            state = self.cell(step, state)
        kept = tuple(tensor.detach() if self.detached else tensor for tensor in state)
        if self.place == "buffer":
            self.h, self.c = kept
        else:
            self.state = kept
        answer: Tensor = self.head(state[0])
        return answer


@pytest.mark.parametrize("place", ["attribute", "buffer"])
def test_a_copy_of_a_model_that_keeps_states_has_nothing_to_learn(place: str) -> None:
    torch.manual_seed(0)
    teacher = Streaming(place).eval()
    student = copy.deepcopy(teacher)
    items = [((clips(index, batch=8),), None) for index in range(6)]
    held = HeldOut(Objective(student, teacher, None, hidden=0.0), items[:3], Share(), Alone())
    with torch.no_grad():
        student(items[4][0][0])
        before = [t.clone() for t in (student.state if place == "attribute" else (student.h, student.c))]
        assert held.loss() == 0.0
        student(items[5][0][0])
        assert held.loss() == 0.0
        student.head.weight.add_(0.1)
        assert held.loss() > 1e-4
        # Looking leaves the states of training where they are.
        held.loss()
        student(items[5][0][0])
    after = student.state if place == "attribute" else (student.h, student.c)
    assert not torch.equal(after[0], before[0])
    again = copy.deepcopy(teacher)
    with torch.no_grad():
        if place == "attribute":
            again.state = tuple(before)
        else:
            again.h, again.c = before
        again(items[5][0][0])
        again(items[5][0][0])
    assert torch.equal(after[0], again.state[0] if place == "attribute" else again.h)


@pytest.mark.parametrize("place", ["attribute", "buffer"])
def test_states_that_are_kept_with_their_gradients_are_cut_off(place: str) -> None:
    model = Streaming(place, detached=False)
    model(clips(1, batch=8))
    cut_off(model)
    assert not any(t.requires_grad for t in (model.state or (model.h, model.c)))
    found = collect(model, [(clips(index, batch=8),) for index in range(3)])
    assert found["cell"]["cell"].steps == 3 * 8 * clips(0).shape[1]

"""Answers that are kept: only those that repeat, only where they depend on the arguments alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from htcompress.finetuning import taught
from htcompress.finetuning.taught import Answer, Taught, fingerprint
from htcompress.values import Arguments


class Counting:
    """A teacher that doubles, and counts how often it was asked."""

    def __init__(self, *, drawn: bool = False) -> None:
        self.asked, self.drawn = 0, drawn

    def __call__(self, arguments: Sequence[Any]) -> Answer:
        self.asked += 1
        noise = torch.randn(()) if self.drawn else 0.0
        return Answer(2 * arguments[0] + noise, {"rnn": [arguments[0] + noise]})


def batches(count: int) -> list[tuple[Tensor]]:
    return [(torch.randn(3, 4),) for _ in range(count)]


def test_batches_that_repeat_are_asked_for_no_more() -> None:
    teacher = Counting()
    keeping, every = Taught(teacher), batches(5)
    for _ in range(6):
        for batch in every:
            found = keeping((batch[0].clone(),))
            assert torch.equal(found.output, 2 * batch[0])
            assert torch.equal(found.states["rnn"][0], batch[0])
    # Twice to see that they repeat, and a few to see that they are the same.
    assert teacher.asked == 2 * 5 + 3


def test_what_never_repeats_is_not_kept() -> None:
    teacher = Counting()
    keeping = Taught(teacher)
    for batch in batches(20):
        keeping(batch)
    assert teacher.asked == 20
    assert not keeping._kept


def test_a_teacher_that_draws_at_random_is_always_asked() -> None:
    teacher = Counting(drawn=True)
    keeping, every = Taught(teacher), batches(2)
    for _ in range(8):
        for batch in every:
            keeping(batch)
    assert teacher.asked == 16


def test_no_more_is_kept_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught, "_MOST_BYTES", 2 * 2 * 3 * 4 * 4)
    teacher = Counting()
    keeping, every = Taught(teacher), batches(5)
    for _ in range(6):
        for batch in every:
            keeping(batch)
    assert len(keeping._kept) == 2
    assert teacher.asked == 6 * 5 - 2 * 4 + 3


def test_arguments_are_told_apart_by_all_that_is_in_them() -> None:
    x = torch.arange(6.0)
    packed = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    values: list[Any] = [
        (x,),
        (x + 0,) * 2,
        (x.reshape(2, 3),),
        (x.double(),),
        (-x,),
        (x.bfloat16(),),
        (x > 2,),
        ([x],),
        ({"x": x},),
        ({"y": x},),
        (x, None),
        (x, 1),
        (x, 1.0),
        (x, True),
        (x, "1"),
        (x, 1, 23),
        (x, 12, 3),
        (packed,),
        (torch.empty(0),),
        (torch.tensor(1.0),),
        Arguments((x,), {"lengths": x}),
    ]
    found = [fingerprint(value) for value in values]
    assert None not in found
    assert len(set(found)) == len(values)
    assert fingerprint((x.clone(),)) == found[0]
    assert fingerprint(Arguments((x.clone(),), {"lengths": x.clone()})) == found[-1]
    # Not contiguous, but the same numbers.
    assert fingerprint((torch.stack([x, x], 1)[:, 0],)) == found[0]


def test_batches_alike_at_a_glance_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught, "_GLANCED", 2)
    teacher = Counting()
    keeping = Taught(teacher)
    every = [(torch.tensor([[1.0, x, 3.0, 4.0]]),) for x in (2.0, 5.0)]
    assert len({fingerprint(batch, 2) for batch in every}) == 1
    for _ in range(5):
        for batch in every:
            assert torch.equal(keeping(batch).output, 2 * batch[0])


def test_what_is_not_understood_is_not_kept() -> None:
    for value in ((object(),), (torch.randn(3).to_sparse(),), ([object()],)):
        assert fingerprint(value) is None
    teacher = Counting()
    keeping, batch = Taught(teacher), (torch.randn(2), object())
    for _ in range(5):
        keeping(batch)
    assert teacher.asked == 5

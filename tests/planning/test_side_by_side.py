"""Directions are planned beside each other on threads that stand idle, and come to the same."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import htcompress
from htcompress.errors import UnreachableError
from htcompress.side_by_side import cached_property, idle_threads, side_by_side


def test_the_order_is_that_of_the_items_and_errors_come_out() -> None:
    with idle_threads(3):
        assert side_by_side(lambda n: n * n, [3, 1, 2]) == [9, 1, 4]
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda n: 1 // n, [1, 0, 2])
        with torch.no_grad():
            found = side_by_side(lambda _: (torch.is_grad_enabled(), torch.get_num_threads()), [0, 1])
        assert found == [(False, 1), (False, 1)]


def test_they_are_beside_each_other_only_where_threads_stand_idle() -> None:
    both = threading.Barrier(2, timeout=20)
    with idle_threads(2):
        assert side_by_side(lambda n: both.wait() >= 0 and n, [1, 2]) == [1, 2]
    here = threading.get_ident()
    assert side_by_side(lambda _: threading.get_ident(), [0, 1]) == [here, here]
    with idle_threads(2):
        assert side_by_side(lambda _: threading.get_ident(), [0]) == [here]


def test_what_is_cached_keeps_nobody_waiting() -> None:
    both = threading.Barrier(2, timeout=20)

    class Waiting:
        @cached_property
        def met(self) -> bool:
            """Whether another was here at the same time."""
            return both.wait() >= 0

    with idle_threads(2):
        assert side_by_side(lambda one: one.met, [Waiting(), Waiting()]) == [True, True]
    assert Waiting.met.__doc__ == "Whether another was here at the same time."


def test_what_two_ask_for_is_computed_once() -> None:
    class Asked:
        times = 0
        begun = threading.Event()

        @cached_property
        def answer(self) -> object:
            self.times += 1
            self.begun.wait(timeout=0.2)
            return object()

        @cached_property
        def failed(self) -> object:
            self.times += 1
            raise ValueError(self.times)

    asked = Asked()
    with idle_threads(2):
        first, second = side_by_side(lambda _: asked.answer, [0, 1])
    assert first is second
    assert asked.times == 1
    for time in (2, 3):
        with pytest.raises(ValueError, match=str(time)):
            _ = asked.failed


@pytest.mark.parametrize("goal", [{"budget": 3000}, {"budget": "8kB"}])
def test_the_plan_is_the_same(goal: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = nn.LSTM(24, 16, 2, bidirectional=True)
    data = [torch.randn(9, 4, 24, generator=torch.Generator().manual_seed(k)) for k in range(3)]

    def planned(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = htcompress.compress(dense, calibration=data, **goal).model  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(before)
        assert found is not None
        return [value for value in found.state_dict().values() if isinstance(value, Tensor)]

    alone, beside = planned(1), planned(3)
    assert len(alone) == len(beside)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_a_budget_that_is_too_small_is_told_from_a_thread_too() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(UnreachableError, match="most compact form"):
            htcompress.compress(nn.LSTM(24, 16, 2, bidirectional=True), budget=3)
    finally:
        torch.set_num_threads(before)

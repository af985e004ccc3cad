"""Batches that count as one: what a step takes of them, and that its loss is that of all in one batch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from crossing import crossed
from oracles import distance
from small import Tagger, clips, equal, tagger
from torch import Tensor, nn
from torch.nn import functional

from htcompress import Compressed
from htcompress.errors import RequestError, TaskError
from htcompress.finetuning.distill import distill
from htcompress.finetuning.scales import in_order, scales_of
from htcompress.finetuning.stream import Share, Stream
from htcompress.isolation import Draws, seeded
from htcompress.request import FineTuning
from htcompress.spread import Spread

Batches = Callable[[], Iterator[tuple[tuple[Any, ...], Any]]]


@pytest.fixture
def student(compressed: Compressed) -> nn.Module:
    assert compressed.model is not None
    return copy.deepcopy(compressed.model)


def single(count: int) -> Batches:
    """Batches of 8 clips whose sizes differ, so that the variances of what is taught do."""
    return lambda: (((clips(i, batch=8) * (1 + i % 3),), tagger()(clips(i, batch=8)).argmax(1)) for i in range(count))


def joined(batches: Batches, size: int) -> Batches:
    """So many of these in one batch, the last as large as what is left."""

    def start() -> Iterator[tuple[tuple[Any, ...], Any]]:
        items = list(batches())
        for begin in range(0, len(items), size):
            part = items[begin : begin + size]
            yield (torch.cat([x for (x,), _ in part]),), torch.cat([y for _, y in part])

    return start


@pytest.mark.parametrize(("counts", "teacher"), crossed(list(product([(24, 2), (23, 3), (40, 4)], [True, False])), 1))
def test_accumulated_batches_train_as_one(student: nn.Module, counts: tuple[int, int], teacher: bool) -> None:
    """Also where a pass ends within a step: 23 batches leave two for the last."""
    count, size = counts
    others: dict[str, Any] = {"steps": 30, "check_every": 5}
    dense = tagger() if teacher else None
    results = []
    for batches, options in (
        (joined(single(count), size), FineTuning(**others)),
        (single(count), FineTuning(**others, accumulate=size)),
    ):
        model = copy.deepcopy(student)
        history = distill(model, dense, batches, loss=functional.cross_entropy, options=options)
        results.append((model, history))
    (one, expected), (other, found) = results
    assert [p.step for p in found] == [p.step for p in expected]
    assert [p.loss for p in found] == pytest.approx([p.loss for p in expected], abs=1e-4)
    assert expected[0].loss - expected[-1].best > 0.02
    for name, tensor in one.state_dict().items():
        if isinstance(tensor, Tensor):
            assert distance(other.state_dict()[name], tensor) < 1e-3, name


def test_a_parameter_that_takes_no_part_in_a_batch_is_trained_by_the_others() -> None:
    class Sometimes(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))
            self.never = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + self.shift if x[0, 0, 0] > 0 else out

    torch.manual_seed(0)
    model = Sometimes()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.shift.fill_(1.0)
    xs = [clips(i, batch=8) for i in range(12)]
    for i, x in enumerate(xs):
        x[0, 0, 0] = (-1.0) ** i
    distill(model, teacher, lambda: iter([((x,), None) for x in xs]), options=FineTuning(steps=20, accumulate=4))
    assert float(model.shift.detach().min()) > 0
    assert torch.equal(model.never, torch.ones(3))


def test_pooled_scales_are_those_of_the_joined_tensors() -> None:
    parts = [torch.randn(5, 3) * 2 + 1, torch.randn(7, 3), torch.tensor([[1.0, torch.inf, 3.0]])]
    scales = scales_of([{"output.0": Spread.of([part])} for part in parts])
    whole = torch.cat(parts)
    whole = whole[torch.isfinite(whole)]
    assert [s["output.0"].variance for s in scales] == pytest.approx([float(whole.var(correction=0))] * 3)
    assert [s["output.0"].weight for s in scales] == pytest.approx([15 * 3 / 38, 21 * 3 / 38, 2 * 3 / 38])
    nothing = scales_of([{"output.0": Spread.of([torch.zeros(0)])}])
    assert (nothing[0]["output.0"].weight, nothing[0]["output.0"].variance) == (0.0, 0.0)


def test_spreads_join_whatever_their_widths() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 2, generator=draw, dtype=torch.float64) * 3 + 1 for n in (9, 14)]
    empty, other = torch.zeros(0, 2), torch.randn(5, 3, generator=draw, dtype=torch.float64)
    whole = torch.cat(parts)
    for tensors in (parts, [empty, *parts], [*parts, empty]):
        first, *others = [Spread.of([t]) for t in tensors]
        for spread in others:
            first = first.joined(spread)
        assert first.count == 46
        assert torch.allclose(first.means, whole.mean(0))
        assert first.variance == pytest.approx(float(whole.var(correction=0)))
    mixed = Spread.of([whole]).joined(Spread.of([other]))
    assert mixed.variance == pytest.approx(float(torch.cat([whole.flatten(), other.flatten()]).var(correction=0)))


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_the_variance_within_channels_where_units_are_apart(offset: float) -> None:
    draw = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = draw + torch.tensor([offset, 0.0])
    wanted = draw.var(0, correction=0).mean() if offset else draw.var(correction=0)
    assert Spread.of([shifted]).variance == pytest.approx(float(wanted))
    pickled = pickle.loads(pickle.dumps(Spread.of([shifted])))
    assert pickled.variance == Spread.of([shifted]).variance


# ---- shares -------------------------------------------------------------------------------------------------


def numbered(count: int) -> Batches:
    return lambda: (((torch.tensor(float(i)),), i) for i in range(count))


@pytest.mark.parametrize(("processes", "accumulated"), [(2, 1), (3, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("count", [24, 29])
def test_processes_share_every_group(processes: int, accumulated: int, count: int) -> None:
    size = processes * accumulated
    streams = [Stream(numbered(count), None, Share(processes, k, accumulated)) for k in range(processes)]
    held = [target for _, target in streams[0].held]
    places = [4 * k + k % 2 for k in range(max(1, -(-count // size) // 4))]
    assert held == [place * size + i for place in places for i in range(size)]
    left = [place for place in range(count) if place not in held]
    wanted = [left[begin : begin + size] for begin in range(0, len(left), size)] * 2
    assert streams[0].length() == len(wanted) // 2
    for group in wanted:
        found = [stream.take() for stream in streams]
        assert [one.count for one in found] == [len(group)] * processes
        assert [[target for _, target in one.own] for one in found] == [group[k::processes] for k in range(processes)]
    assert [stream.passes for stream in streams] == [1] * processes
    skipped = Stream(numbered(count), None, Share(processes, 0, accumulated))
    skipped.skip(len(wanted))
    assert skipped.take() == streams[0].take()


def test_what_processes_give_is_put_in_order() -> None:
    share = [Share(2, k, 2) for k in range(2)]
    items = list(range(11))
    assert in_order([one.own(items) for one in share], 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_data_for_less_than_two_steps_is_still_held_out_in_part() -> None:
    stream = Stream(numbered(6), None, Share(2, 0, 4))
    assert [target for _, target in stream.held] == [0]
    assert [target for _, target in stream.take().own] == [1, 3, 5]


def test_draws_of_the_data_do_not_depend_on_those_of_the_models() -> None:
    def noise() -> Iterator[Any]:
        while True:
            yield (torch.randn(3),), None

    found = []
    for drawn in (0, 5):
        with seeded(0):
            stream = Stream(noise, 1, apart=True)
            values = []
            for _ in range(4):
                values.append(stream.take().own[0][0][0])
                torch.randn(drawn)
            found.append(torch.stack(values))
    assert torch.equal(*found)
    before = torch.get_rng_state()
    with Draws()():
        torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)


# ---- options ------------------------------------------------------------------------------------------------


def test_bfloat16_comes_near_to_full_precision(student: nn.Module) -> None:
    histories = []
    for precision in ("no", "bf16"):
        model = copy.deepcopy(student)
        options = FineTuning(steps=40, check_every=10, mixed_precision=precision)
        histories.append(distill(model, tagger(), single(16), options=options))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    full, mixed = ([p.loss for p in history] for history in histories)
    assert mixed[0] == full[0]
    assert mixed[1:] != full[1:]
    assert mixed == pytest.approx(full, rel=0.01)
    assert full[-1] < 0.95 * full[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 0}, "accumulate of at least 1; found 0"),
        ({"accumulate": 1.5}, "accumulate of at least 1; found 1.5"),
        ({"mixed_precision": "fp16"}, "mixed precision of no or bf16; found 'fp16'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        FineTuning(**options)


def test_one_batch_is_too_few_however_they_are_shared() -> None:
    with pytest.raises(TaskError, match="at least two batches"):
        Stream(numbered(1), None, Share(2, 0))


def test_alone_and_without_accumulation_nothing_has_changed(student: nn.Module) -> None:
    model = copy.deepcopy(student)
    distill(student, tagger(), single(10), options=FineTuning(steps=12))
    distill(model, tagger(), single(10), options=FineTuning(steps=12, accumulate=1, mixed_precision="no"))
    assert equal(student.state_dict(), model.state_dict())


def test_a_stage_that_ends_early_leaves_the_count_of_steps_as_it_would_be(
    student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_STAGE": 20, "_PASSES": 100, "_GAIN": -1.0}.items():
        monkeypatch.setattr(f"htcompress.finetuning.distill.{name}", value)
    options = FineTuning(check_every=2, patience=1, learning_rate=1e-9)
    history = distill(student, tagger(), single(10), options=options)
    assert list(dict.fromkeys(p.steps for p in history)) == [20, 60, 140]
    first, *_ = [p.step for p in history if p.steps == 60]
    assert first == 22
    assert max(p.step for p in history if p.steps == 20) < 20


def test_sorted_data_is_held_out_of_every_part() -> None:
    stream = Stream(numbered(48), None)
    held = [target for _, target in stream.held]
    assert len(held) == 12
    assert {place // 12 for place in held} == {0, 1, 2, 3}
    # Batches that alternate are both held out.
    assert {place % 2 for place in held} == {0, 1}

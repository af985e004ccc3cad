"""Fine-tuning: towards the teacher, never worse on what is held out, and nothing else is changed."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small import CLASSES, HIDDEN, INPUTS, Tagger, clips, equal, tagger
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import htcompress
from htcompress import Compressed
from htcompress.errors import TaskError
from htcompress.finetuning.distill import Progress, distill, evaluating
from htcompress.finetuning.stream import Stream
from htcompress.request import FineTuning

Item = tuple[tuple[Any, ...], Any]
Batches = Callable[[], Iterator[Item]]


def passes(count: int = 10, seed: int = 20, targets: bool = False) -> Batches:
    """The same batches in every pass, with the teacher's classes as targets if asked for."""

    def start() -> Iterator[Item]:
        for index in range(count):
            x = clips(seed + index, batch=8)
            yield (x,), tagger()(x).argmax(1) if targets else None

    return start


def noise() -> Iterator[Item]:
    """New batches for ever, drawn from torch's own generator."""
    while True:
        yield (torch.randn(8, 5, INPUTS),), None


def distance(student: nn.Module, teacher: nn.Module, batches: list[Tensor]) -> float:
    """The mean squared difference of the outputs in units of the teacher's variance, written anew."""
    with torch.no_grad():
        parts = []
        for x in batches:
            a, b = student(x), teacher(x)
            parts.append(float(((a - b) ** 2).mean() / ((b - b.mean()) ** 2).mean()))
    return sum(parts) / len(parts)


@pytest.fixture
def student(compressed: Compressed) -> nn.Module:
    assert compressed.model is not None
    return copy.deepcopy(compressed.model)


def watched_rates(monkeypatch: pytest.MonkeyPatch, group: int) -> list[float]:
    """The learning rate of a parameter at every step to come; of -1, the head, which both models have alike."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append(self.param_groups[group]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return rates


HELD = [clips(20 + index, batch=8) for index in range(4)]
FRESH = [clips(900 + index, batch=8) for index in range(4)]


def test_distillation_alone_recovers_the_teachers_outputs(student: nn.Module) -> None:
    teacher = tagger()
    before = distance(student, teacher, FRESH)
    history = distill(student, teacher, noise, options=FineTuning(steps=200))
    assert history[-1].best < 0.7 * history[0].loss
    assert distance(student, teacher, FRESH) < 0.7 * before


def test_one_seed_one_result(compressed: Compressed) -> None:
    def run(seed: int, callers: int) -> tuple[dict[str, Tensor], list[Progress]]:
        model = copy.deepcopy(compressed.model)
        assert model is not None
        torch.manual_seed(callers)
        history = distill(model, tagger(), noise, options=FineTuning(steps=10, check_every=5, seed=seed))
        return model.state_dict(), history

    (state, history), (same, again), (other, _) = run(1, 5), run(1, 6), run(2, 5)
    assert equal(state, same)
    assert history == again
    assert not equal(state, other)


def test_nothing_but_the_student_is_changed(student: nn.Module) -> None:
    teacher = tagger().train()
    teacher.head.eval()
    state, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    torch.manual_seed(77)
    generator = torch.random.get_rng_state()
    before = copy.deepcopy(student.state_dict())
    distill(student, teacher, passes(), options=FineTuning(steps=25))
    assert equal(teacher.state_dict(), state)
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not equal(student.state_dict(), before)
    assert not any(m.training for m in student.modules())


def test_an_error_restores_as_well(student: nn.Module) -> None:
    teacher = tagger().train()
    generator = torch.random.get_rng_state()
    with pytest.raises(TaskError):
        distill(student, teacher, passes(1))
    assert all(m.training for m in teacher.modules())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_evaluation_mode_ends_with_its_block() -> None:
    model = nn.Sequential(nn.Linear(1, 1).eval(), nn.Dropout())
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes == [True, False, True]
    with evaluating(None):
        pass


# ---- the best state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("learning_rate", [10.0, 1e4, 1e30])
def test_steps_that_diverge_are_not_kept(student: nn.Module, learning_rate: float) -> None:
    teacher = tagger()
    before = distance(student, teacher, HELD)
    options = FineTuning(steps=30, check_every=3, learning_rate=learning_rate, clip=1e9, held_out=len(HELD))
    history = distill(student, teacher, passes(), options=options)
    assert history[0].loss == pytest.approx(before, rel=1e-4)
    assert max(p.loss for p in history) > before
    assert distance(student, teacher, HELD) == pytest.approx(history[-1].best, rel=1e-4)
    assert history[-1].best <= history[0].loss


def test_the_best_state_is_kept_and_not_the_last(student: nn.Module) -> None:
    teacher = tagger()
    states: list[dict[str, Tensor]] = []

    def poisoned(output: Tensor, target: Tensor) -> Tensor:
        # From the middle on, a loss pulls the model away from the teacher while it trains.
        step = len(states)
        strength = 1e4 if step >= 3 and torch.is_grad_enabled() else 0.0
        return strength * (output - 100).square().mean()

    def watch(progress: Progress) -> None:
        states.append(copy.deepcopy(student.state_dict()))

    options = FineTuning(steps=60, check_every=10, learning_rate=0.02, held_out=4)
    history = distill(student, teacher, passes(12, targets=True), loss=poisoned, options=options, on_progress=watch)
    losses = [p.loss for p in history]
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 1
    assert losses[-1] > losses[best]
    assert equal(student.state_dict(), states[best])


def test_steps_are_relative_to_the_size_of_each_tensor(student: nn.Module) -> None:
    sizes = {name: float(p.detach().square().mean().sqrt()) for name, p in student.named_parameters()}
    before = copy.deepcopy(student.state_dict())
    options = FineTuning(steps=1, learning_rate=1e-3, check_every=1, held_out=2)
    # The first step of Adam moves every number by the learning rate; a model it improved is kept.
    distill(student, tagger(), passes(), options=options)
    moved = {
        name: float((parameter.detach() - before[name]).abs().max()) / max(sizes[name], 1e-2)
        for name, parameter in student.named_parameters()
    }
    first = next(iter(moved.values()))
    assert 0 < first < 1e-3
    assert list(moved.values()) == pytest.approx([first] * len(moved), rel=1e-2)


def test_a_model_near_its_teacher_takes_short_steps(student: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = watched_rates(monkeypatch, -1)
    near = htcompress.compress(tagger(), budget=900, layout="svd").model
    assert near is not None
    apart = [distance(model, tagger(), HELD) for model in (near, student)]
    assert apart[0] < 0.3 * apart[1]
    for model in (near, student):
        distill(model, tagger(), passes(), options=FineTuning(steps=1, held_out=len(HELD)))
    assert rates[0] / rates[1] == pytest.approx((apart[0] / apart[1]) ** 0.5, rel=1e-3)


def test_going_astray_leads_back_to_the_best_state_with_shorter_steps(student: nn.Module) -> None:
    options = FineTuning(steps=200, check_every=5, learning_rate=1.0, held_out=2)
    history = distill(student, tagger(), passes(), options=options)
    assert any(p.loss > 2 * p.best for p in history)
    assert history[-1].best < 0.8 * history[0].loss


def test_a_negative_loss_is_not_astray(student: nn.Module) -> None:
    def reward(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target) - 10

    options = FineTuning(steps=60, check_every=5, learning_rate=1e-3)
    history = distill(student, tagger(), passes(targets=True), loss=reward, options=options)
    assert history[-1].step == 60
    assert history[-1].best < history[0].loss < 0


def test_the_teacher_answers_the_held_out_batches_once(student: nn.Module) -> None:
    teacher, seen = tagger(), []
    teacher.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    distill(student, teacher, passes(), options=FineTuning(steps=6, check_every=1, held_out=3))
    assert [sum(torch.equal(x, held) for x in seen) for held in HELD[:3]] == [1, 1, 1]
    assert len(seen) == 3 + 6


def test_nothing_left_to_gain_ends_it() -> None:
    same = htcompress.compress(tagger(), error=0.0).model
    assert same is not None
    options = FineTuning(steps=1000, check_every=2, patience=2, learning_rate=1e-2)
    assert distill(same, tagger(), passes(), options=options)[-1].step < 100


def test_a_time_limit_ends_it_in_time_and_at_the_end_of_its_schedule(
    student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("htcompress.finetuning.distill.time.monotonic", lambda: float(next(clock)))
    rates = watched_rates(monkeypatch, 0)
    history = distill(student, tagger(), passes(), options=FineTuning(steps=1000, time_limit=20, check_every=100))
    assert history[-1].step == len(rates)
    assert 18 <= len(rates) <= 20
    assert rates[-1] < 0.01 * max(rates)


def test_no_steps_no_change(student: nn.Module) -> None:
    before = copy.deepcopy(student.state_dict())
    history = distill(student, tagger(), passes(), options=FineTuning(steps=0))
    assert [p.step for p in history] == [0]
    assert equal(student.state_dict(), before)


def test_progress_is_told(student: nn.Module) -> None:
    seen: list[Progress] = []
    options = FineTuning(steps=23, check_every=10)
    history = distill(student, tagger(), passes(), options=options, on_progress=seen.append)
    assert seen == history
    assert [(p.step, p.steps) for p in seen] == [(0, 23), (10, 23), (20, 23), (23, 23)]
    assert [p.best for p in seen] == list(itertools.accumulate((p.loss for p in seen), min))


# ---- the data -----------------------------------------------------------------------------------------------


class Recorder:
    """A loss that keeps the targets it trained on and those it only looked at."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.looked: set[int] = set()

    def __call__(self, output: Tensor, target: int) -> Tensor:
        if torch.is_grad_enabled():
            self.trained.append(target)
        else:
            self.looked.add(target)
        return output.square().mean() * 0


def numbered(start: int, count: int) -> Iterator[Item]:
    for index in range(start, start + count):
        yield (clips(index),), index


class Slow(nn.Module):
    """One number that multiplies what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def test_what_is_held_out_is_never_trained_on(student: nn.Module) -> None:
    record = Recorder()
    distill(student, tagger(), lambda: numbered(0, 7), loss=record, options=FineTuning(steps=8, check_every=4))
    assert record.looked == {0}
    assert record.trained == [1, 2, 3, 4, 5, 6, 1, 2]


@pytest.mark.parametrize(
    ("count", "asked", "held"),
    [(2, None, 1), (5, None, 1), (8, None, 2), (47, None, 11), (60, None, 12), (2, 4, 1), (5, 4, 4), (6, 4, 4)],
)
def test_what_is_held_out(student: nn.Module, count: int, asked: int | None, held: int) -> None:
    record = Recorder()
    options = FineTuning(steps=3, held_out=asked)
    distill(student, tagger(), lambda: numbered(0, count), loss=record, options=options)
    places = [4 * k + k % 2 for k in range(held)] if asked is None else list(range(held))
    assert record.looked == set(places)
    left = [place for place in range(count) if place not in places]
    assert record.trained == (left * 3)[:3]


def test_large_batches_are_not_kept_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htcompress.finetuning.stream._KEPT", 7 * clips(0).nbytes)
    stream = Stream(lambda: numbered(0, 60), None)
    assert len(stream.held) == 2
    assert [next(stream)[1] for _ in range(8)] == [1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.whole
@pytest.mark.parametrize(("count", "steps"), [(8, 400), (320, 1200), (10_000, 2800)])
def test_without_a_length_it_follows_the_data(count: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number moved towards another a little at every step: it never stops to gain."""
    monkeypatch.setattr("htcompress.finetuning.distill._NEAR", math.inf)
    student, teacher = Slow(), Slow()
    with torch.no_grad():
        teacher.w.fill_(100.0)
    batches = [((torch.ones(2, 1) + i % 2,), None) for i in range(count)]
    assert distill(student, teacher, lambda: iter(batches))[-1].steps == steps


@pytest.mark.whole
def test_without_a_gain_it_does_not_go_on(student: nn.Module) -> None:
    still = FineTuning(learning_rate=0.0, patience=1000)
    history = distill(student, tagger(), lambda: numbered(0, 10_000), options=still)
    assert (history[-1].step, history[-1].steps) == (400, 400)


def test_a_further_stage_begins_anew_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htcompress.finetuning.distill._STAGE", 20)
    rates = watched_rates(monkeypatch, 0)
    options = FineTuning(learning_rate=1e-2, check_every=5)
    history = distill(tagger(4), tagger(), lambda: numbered(0, 10_000), options=options)
    assert [p.step for p in history][-1] == 20 + 40 + 80
    assert rates[0] < rates[3] > 50 * rates[19]
    assert rates[20] < rates[25] > 50 * rates[59]
    assert [p.best for p in history] == list(itertools.accumulate((p.loss for p in history), min))


@pytest.mark.parametrize(("near", "stages"), [(0.0, 3), (math.inf, 1)])
def test_after_two_passes_it_goes_on_until_it_is_near_the_teacher(
    near: float, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("htcompress.finetuning.distill._STAGE", 40)
    monkeypatch.setattr("htcompress.finetuning.distill._NEAR", near)
    options = FineTuning(learning_rate=1e-2, check_every=10)
    history = distill(tagger(4), tagger(), lambda: numbered(0, 20), options=options)
    assert history[-1].step == sum(40 * 2**i for i in range(stages))


def test_without_a_teacher_two_passes_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htcompress.finetuning.distill._STAGE", 40)
    options = FineTuning(learning_rate=1e-2, check_every=10)
    history = distill(tagger(4), None, passes(20, targets=True), loss=nn.CrossEntropyLoss(), options=options)
    assert history[-1].step == 40


@pytest.mark.parametrize(("epochs", "steps"), [(1, 15), (2.5, 38), (0.01, 1)])
def test_epochs_are_passes_over_what_is_trained_on(student: nn.Module, epochs: float, steps: int) -> None:
    record = Recorder()
    options = FineTuning(epochs=epochs)
    distill(student, tagger(), lambda: numbered(0, 20), loss=record, options=options)
    assert len(record.trained) == steps
    trained = [place for place in range(20) if place not in (0, 5, 8, 13, 16)]
    assert set(record.trained[:15]) == set(trained[:steps])


def test_epochs_of_data_without_end(student: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htcompress.finetuning.stream._LONGEST", 50)
    with pytest.raises(TaskError, match="has not ended after 50 batches; give --steps"):
        distill(student, tagger(), lambda: numbered(0, 50), options=FineTuning(epochs=1))


def test_data_without_end_is_read_as_needed(student: nn.Module) -> None:
    record, drawn = Recorder(), itertools.count()

    def endless() -> Iterator[Item]:
        while True:
            index = next(drawn)
            yield (clips(index),), index

    distill(student, tagger(), endless, loss=record, options=FineTuning(steps=12))
    held = [4 * k + k % 2 for k in range(12)]
    assert record.trained == [place for place in range(48) if place not in held][:12]
    assert next(drawn) == 48


def test_a_generator_that_ends_is_told_and_not_waited_for(student: nn.Module) -> None:
    once = numbered(0, 8)
    distill(student, tagger(), lambda: once, options=FineTuning(steps=6))
    once = numbered(0, 8)
    with pytest.raises(TaskError, match=r"ran out of data: called again, training\(\) yields 0 batches"):
        distill(student, tagger(), lambda: once, options=FineTuning(steps=7))


def test_a_later_pass_may_be_longer_but_not_too_short(student: nn.Module) -> None:
    lengths = iter([6, 9, 4])
    record = Recorder()
    options = FineTuning(steps=30, held_out=4)
    with pytest.raises(TaskError, match="yields 4 batches, no more than are held out"):
        distill(student, tagger(), lambda: numbered(0, next(lengths)), loss=record, options=options)
    assert record.trained == [4, 5, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_batches(student: nn.Module, count: int) -> None:
    with pytest.raises(
        TaskError, match=f"at least two batches, one of them held out; what there is to train on has {count}"
    ):
        distill(student, tagger(), lambda: numbered(0, count))


# ---- losses -------------------------------------------------------------------------------------------------


def test_a_loss_and_targets_train_without_a_teacher(student: nn.Module) -> None:
    def accuracy() -> float:
        with torch.no_grad():
            return float(
                torch.stack([(student(x).argmax(1) == tagger()(x).argmax(1)).float().mean() for x in FRESH]).mean()
            )

    with torch.no_grad():  # the head unlearns what it knew: the way back leads through the targets
        student.head.weight.mul_(-1)
        student.head.bias.mul_(-1)
    before = accuracy()
    assert before < 0.5
    batches = passes(40, targets=True)
    history = distill(student, None, batches, loss=functional.cross_entropy, options=FineTuning(steps=150))
    assert history[-1].best < 0.8 * history[0].loss
    assert accuracy() > before + 0.2


@pytest.mark.parametrize(("targets", "loss"), [(False, functional.cross_entropy), (True, None), (False, None)])
def test_without_a_teacher_there_must_be_something_to_train_on(
    student: nn.Module, targets: bool, loss: Callable[..., Tensor] | None
) -> None:
    with pytest.raises(TaskError, match=r"needs targets from training\(\) and a loss\(\)"):
        distill(student, None, passes(targets=targets), loss=loss)


def test_the_loss_is_added_to_the_distance(student: nn.Module) -> None:
    plain = distill(student, tagger(), passes(targets=True), options=FineTuning(steps=0))[0].loss
    added = distill(
        student, tagger(), passes(targets=True), loss=lambda o, t: torch.tensor([2.5]), options=FineTuning(steps=0)
    )[0].loss
    assert added == pytest.approx(plain + 2.5, rel=1e-5)
    without = distill(student, tagger(), passes(), loss=functional.cross_entropy, options=FineTuning(steps=0))[0].loss
    assert without == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "words"), [(0.5, "float"), (None, "NoneType"), (torch.zeros(2), r"a tensor of shape \(2,\)")]
)
def test_a_loss_that_is_no_number(student: nn.Module, value: Any, words: str) -> None:
    with pytest.raises(TaskError, match=f"returned {words}; expected a tensor with one number"):
        distill(student, tagger(), passes(targets=True), loss=lambda output, target: value)


def test_batches_that_fit_no_model_are_told_in_the_teachers_words(student: nn.Module) -> None:
    def narrow() -> Iterator[Item]:
        for _ in range(3):
            yield (torch.zeros(2, 5, 23),), None

    with pytest.raises(TaskError, match=r"batch of training\(\) .*Expected 24, got 23"):
        distill(student, tagger(), narrow)


def test_outputs_that_do_not_compare(student: nn.Module) -> None:
    class Pooled(Tagger):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(0)

    with pytest.raises(TaskError, match=r"of shapes \[\(3,\)\] and \[\(8, 3\)\]; distillation needs equal ones"):
        distill(student, Pooled(), passes())


# ---- models of other kinds ----------------------------------------------------------------------------------


class Many(Tagger):
    """Gives its output in a form of its own."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Any) -> Any:
        states, (h, c) = self.rnn(x["x"] if isinstance(x, dict) else x)
        if isinstance(states, PackedSequence):
            return states, self.head(h[0])
        logits = self.head(states[:, -1])
        return {
            "tuple": (logits, h),
            "dict": {"logits": logits, "states": [states, c], "steps": torch.arange(3), "note": "text", "none": None},
            "nested": ([{"a": (logits,)}], h.bool()),
        }[self.form]


@pytest.mark.parametrize("form", ["tuple", "dict", "nested", "packed"])
def test_outputs_and_inputs_in_any_form(form: str) -> None:
    torch.manual_seed(0)
    model = Many(form).eval()
    made = htcompress.compress(model, budget=400, layout="svd").model
    assert made is not None

    def batches() -> Iterator[Item]:
        for index in range(10):
            x: Any = clips(index, batch=8)
            if form == "packed":
                x = pack_sequence([x[0], x[1][:3], x[2][:1]], enforce_sorted=False)
            yield ({"x": x} if form == "dict" else x,), None

    history = distill(made, model, batches, options=FineTuning(steps=40, check_every=10, held_out=2))
    assert history[-1].best < 0.97 * history[0].loss


class Noisy(nn.Module):
    """Every kind of noise and running statistics around a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm1d(INPUTS)
        self.rnn = nn.LSTM(INPUTS, HIDDEN, num_layers=2, dropout=0.5, batch_first=True)
        self.instance = nn.InstanceNorm1d(HIDDEN, track_running_stats=True)
        self.dropout = nn.Sequential(nn.Dropout(0.5), nn.Dropout1d(0.5))
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x.transpose(1, 2)).transpose(1, 2)
        x = self.instance(self.rnn(x)[0].transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(x)[:, -1])


def test_noise_is_off_and_running_statistics_stay() -> None:
    torch.manual_seed(0)
    model = Noisy()
    for x in FRESH:
        model(x)
    model.eval()
    student = htcompress.compress(model, budget=900, layout="svd").model
    assert student is not None
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    outputs: list[Tensor] = []

    def keep(output: Tensor, target: Any) -> Tensor:
        if torch.is_grad_enabled():
            outputs.append(output.detach())
        return output.sum() * 0

    def same() -> Iterator[Item]:
        while True:
            yield (FRESH[0],), 0

    still = FineTuning(steps=3, learning_rate=0.0)
    distill(student, model, same, loss=keep, options=still)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], student(FRESH[0]))
    distill(student, model, passes(), options=FineTuning(steps=10))
    assert len(buffers) == 6
    assert equal(dict(student.named_buffers()), buffers)


def test_frozen_parameters_stay(student: nn.Module) -> None:
    assert isinstance(student, Tagger)
    student.head.requires_grad_(False)
    before = copy.deepcopy(student.state_dict())
    distill(student, tagger(), passes(), options=FineTuning(steps=25))
    assert torch.equal(student.head.weight, before["head.weight"])
    assert not equal(student.state_dict(), before)

"""The stages of a compression, each a function of frozen things; `htcompress.compression` puts them in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.data import (
    Data,
    Peeked,
    Reading,
    alternating,
    calibration_reading,
    direction_of,
    finite,
    to_device,
    training_reading,
    training_stream,
)
from htcompress.directory.read import assembled
from htcompress.errors import TaskError
from htcompress.finetuning.checkpoints import Checkpoints
from htcompress.finetuning.distill import distill
from htcompress.finetuning.standing import Progress
from htcompress.finetuning.stream import Batches
from htcompress.finetuning.together import Together
from htcompress.isolation import on_the_cpu, seeded
from htcompress.matrix.blocks import DOUBLED
from htcompress.memory import give_back
from htcompress.model.inventory import check_parameters, inventory_of_model
from htcompress.model.latency import LATENCY_OF, latencies
from htcompress.model.names import listed
from htcompress.model.plain import without_packing
from htcompress.model.proof import Answer, Proof, answer
from htcompress.model.replace import copied, stand_ins, with_stand_ins
from htcompress.model.statistics import DirectionStatistics, collect, remarks
from htcompress.model.threads import threads_for_matrices
from htcompress.model.units import arrange_units, unit_orders
from htcompress.nn.dense import DenseLayer
from htcompress.nn.recurrent import HTRecurrent, module_class
from htcompress.nn.settings import RecurrentSettings
from htcompress.observer import Observer
from htcompress.planning import Plan, has_room_for, plan_model
from htcompress.report import Latency, Quality
from htcompress.request import FineTuning, Goal
from htcompress.task import output_of
from htcompress.values import Arguments, precision_of
from htcompress.vocabulary import UnitOrder

_LOOKED_AT = (2, 3, 4, 8, 16, 32, 64)
"""The batches, by their number, that show beside the first whether units may be moved: data may be in an order."""

Statistics = Mapping[str, Mapping[str, DirectionStatistics]]
"""What was seen of each layer and direction."""

Orders = Mapping[str, Mapping[str, Tensor]]
"""Orders of hidden units by layer and direction."""


@dataclass(frozen=True, eq=False)
class Tried:
    """A batch of the user's, as the model takes it, and what the dense model answers."""

    item: Any
    reading: Reading
    arguments: Arguments
    answer: Answer


def tried(model: nn.Module, data: Data, calibration: Peeked | None, training: Peeked | None) -> Tried | None:
    """The first batch of the calibration data, or else of the training data; None where there is no data.

    Raises `TaskError` where the calibration data is empty, or no reading of it fits the model.
    """
    if calibration is not None:
        if calibration.empty:
            raise TaskError("calibration() yields nothing; it must yield at least one batch of the model's input.")
        reading, found = calibration_reading(model, calibration.first)
        return Tried(calibration.first, reading, reading(calibration.first), found)
    if training is None or training.empty:
        return None
    pairs = training_reading(model, training.first, loss=data.loss)
    given, _ = pairs(training.first)
    return Tried(training.first, lambda item: pairs(item)[0], given, answer(model, given))


def training_batches(model: nn.Module, data: Data, training: Peeked, known: Tried | None = None) -> Batches:
    """Passes over the training data, as the model takes it, and what is unlabelled between.

    Raises `TaskError` where there is none, or no reading of it fits the model.
    """
    if training.empty:
        raise TaskError(
            "Fine-tuning needs at least two batches, one of them held out; training() yields 0. Yield smaller "
            "batches, or convert with --no-finetune."
        )
    like = None if known is None else (known.item, known.reading)
    reading = training_reading(model, training.first, loss=data.loss, like=like)
    labelled = training_stream(reading, training)
    if data.unlabelled is None:
        return labelled
    further = Peeked(data.unlabelled)
    if further.empty:
        raise TaskError("unlabelled() yields nothing; it must yield batches of the model's input, or be left out.")
    plain, _ = calibration_reading(model, further.first, source="unlabelled()")
    return alternating(labelled, lambda: ((plain(item), None) for item in further()))


def observed(
    model: nn.Module, proof: Proof, calibration: Peeked, batch: Tried, seed: int, observer: Observer
) -> Statistics | None:
    """What passes through the layers on the calibration data; None where there are none to look at."""
    if not proof.names:
        return None
    observer.stage("calibrating")
    last: list[Arguments] = []

    def batches() -> Iterator[Arguments]:
        for item in calibration():
            last[:] = [batch.reading(item)]
            yield last[0]

    try:
        found = collect(model, batches(), names=proof.names, tied=proof.tied, seed=seed, on_batch=observer.advance)
        for sentence in remarks(found):
            observer.message(sentence)
        give_back()
        return found
    except TaskError:
        raise
    except Exception:
        # A batch that the dense model cannot take either is the task's fault, and told in the model's words.
        if last:
            with torch.no_grad():
                output_of(copied(model, sharing=model.parameters()), last[0], source="calibration()")
        raise


@dataclass(frozen=True, eq=False)
class Arrangement:
    """A dense model whose layers are to be planned, and how their units are ordered.

    Attributes:
        model: the dense model, its units moved where that was asked for.
        layers: its layers that are to be compressed.
        statistics: of these, in the order of the units; None without data.
        orders: in which the matrices are to be folded, and which are stored beside them.
        moved: those in which the units stand in the whole model.
    """

    model: nn.Module
    layers: list[DenseLayer]
    statistics: Statistics | None
    orders: Orders | None = None
    moved: Orders | None = None


def arranged(
    model: nn.Module,
    proof: Proof,
    statistics: Statistics | None,
    batch: Tried | None,
    goal: Goal,
    calibration: Peeked | None = None,
) -> Arrangement:
    """The layers of a model with their units in a good order, as far as that was asked for and is known.

    Where units are moved, some batches of the calibration data tell whether anything knows them that was not moved.
    """
    layers = inventory_of_model(model, names=proof.names)
    asked = goal.folds and goal.units is not UnitOrder.KEEP and goal.error is None
    if statistics is None or batch is None or not asked:
        return Arrangement(model, layers, statistics)
    with on_the_cpu(), _threads_for(layers):
        if goal.units is UnitOrder.AUTO:
            orders = unit_orders(layers, statistics)
            if has_room_for(orders, layers, goal):
                return Arrangement(model, layers, statistics, orders=orders)
        shown = [batch.arguments]
        items: Iterator[Any] = iter(()) if calibration is None else islice(calibration(), max(_LOOKED_AT))
        shown += [batch.reading(item) for at, item in enumerate(items, start=1) if at in _LOOKED_AT]
        found = arrange_units(model, statistics, shown, cautious=goal.units is UnitOrder.AUTO)
    layers = inventory_of_model(found.model, names=proof.names)
    return Arrangement(found.model, layers, found.statistics, moved=found.orders)


def _threads_for(layers: list[DenseLayer]) -> AbstractContextManager[None]:
    """As many threads as the work on the layers' matrices is worth."""
    matrices = [matrix for layer in layers for own in layer.directions.values() for matrix in (own.ih, own.hh)]
    return threads_for_matrices(max((matrix.numel() for matrix in matrices), default=0))


def planned(
    layers: list[DenseLayer], goal: Goal, statistics: Statistics | None, orders: Orders | None, observer: Observer
) -> Plan:
    """Which form every matrix gets; see `plan_model`."""
    observer.stage("decomposing")
    with torch.no_grad(), on_the_cpu(), _threads_for(layers):
        plan = plan_model(layers, goal, statistics, orders)
    # Searches and their ladders hold each other; of small matrices they hold less than looking for them is worth.
    give_back(collect=sum(layer.settings.dense_parameters for layer in layers) > DOUBLED)
    return plan


def compact_model(dense: nn.Module, plan: Plan, tied: Mapping[str, str]) -> tuple[nn.Module, dict[str, HTRecurrent]]:
    """A copy of a dense model with the planned layers in it, and these by name; tied ones share their cores."""
    device = device_of(dense)
    modules = {layer.name: layer.build().to(device) for layer in plan.layers}
    for name, owner in tied.items():
        settings = RecurrentSettings.of(dense.get_submodule(name))
        modules[name] = module_class(settings)(settings, list(modules[owner].directions().values()))
    return with_stand_ins(dense, modules).eval(), modules


def measured(quality: Quality, stage: str, model: nn.Module, data: Data, seed: int, observer: Observer) -> Quality:
    """The quality with one more stage, where there is a metric; the user's code is given a copy of the model."""
    if data.evaluate is None:
        return quality
    observer.stage(f"evaluating the {stage} model")
    trial = copied(model).eval()
    with seeded(seed), without_packing(trial):
        metrics = data.evaluate(trial)
    give_back()
    broken = finite(metrics)
    if broken and stage == "dense":
        check_parameters(model, "The model")
        raise TaskError(f"evaluate(model) gave {listed(broken)} for the dense model; expected finite numbers.")
    if broken:
        observer.message(f"The {stage} model has {listed(broken)}: it counts as not measured.")
        return quality
    higher = direction_of(next(iter(metrics)), data.higher_is_better)
    return quality.with_stage(stage, metrics, higher_is_better=higher)


def tuned(
    compact: nn.Module,
    teacher: nn.Module | None,
    batches: Batches,
    data: Data,
    options: FineTuning,
    observer: Observer,
    places: Mapping[str, Tensor] | None = None,
    together: Together | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[Progress]:
    """Fine-tune in place, and end on the numbers that will be stored; see `distill`. What came of it."""
    total = None

    def show(progress: Progress) -> None:
        nonlocal total
        if progress.steps != total:
            total = progress.steps
            observer.stage("fine-tuning further" if progress.step else "fine-tuning", total)
        observer.advance(progress.step, f"loss {progress.loss:.3g}, best {progress.best:.3g}")

    history = distill(
        compact,
        None if teacher is None else copied(teacher, sharing=teacher.parameters()),
        batches,
        loss=data.loss,
        options=options,
        places=places,
        on_progress=show,
        together=together,
        checkpoints=checkpoints,
    )
    for module in stand_ins(compact).values():
        module.round()
    times = history[-1].unmeasured
    if times:
        observer.message(
            f"Fine-tuning met {times} time(s) a batch of training() whose loss() is no finite number: it was left out "
            f"there. Are all of its targets ignored?"
        )
    return history


def tell_if_in_vain(histories: Sequence[list[Progress]], observer: Observer) -> None:
    """Say so where no round of fine-tuning has gained anything."""
    if all(history[-1].best >= history[0].loss for history in histories):
        steps = sum(history[-1].step for history in histories)
        if not any(isfinite(history[-1].best) for history in histories):
            observer.message(
                f"The loss of all batches that were held out is no finite number in {steps} steps, so nothing tells "
                f"what is better: the model stays as it was. Correct loss() or the targets of training()."
            )
            return
        observer.message(f"Fine-tuning has gained nothing in {steps} steps: the model stays as it was.")


def kept_if_better(
    compact: nn.Module, before: Mapping[str, Any], judge: Callable[[nn.Module], float], observer: Observer
) -> None:
    """Let a fine-tuned model be what it was `before` where its answers have become worse, as `judge` has it."""
    learnt = snapshot(compact)
    after = judge(compact)
    compact.load_state_dict(before)
    was = judge(compact)
    if after < was:
        compact.load_state_dict(learnt)
    else:
        observer.message(
            f"Fine-tuning brought the layers nearer to the original's, but not what the model puts out ({was:.4f} off "
            f"before, {after:.4f} after, on calibration data): it stays as it was."
        )


def read_back(
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    fresh: nn.Module,
    compact: nn.Module,
    arguments: Arguments | None,
) -> nn.Module:
    """What would be written, in a fresh model, which must answer as the one that was made.

    Raises `TaskError` where it does not.
    """
    again = assembled(config, state, fresh, Path("The output"), strict=False).to(device_of(compact)).eval()
    if arguments is not None:
        lost = answer(again, arguments).difference(answer(compact, arguments))
        if not lost <= precision_of(compact):
            raise TaskError(
                f"Read back into a fresh model, what would be written answers otherwise (by {lost:.2g}): something "
                f"that is no parameter and no buffer decides what the model answers. Register it as a buffer, or "
                f"let model() make it alike each time."
            )
    return again


def latency_of(dense: nn.Module, compact: nn.Module, batch: Tried | None, observer: Observer) -> Latency | None:
    """How long a call takes, before and after; None without anything to call the models with."""
    if batch is None:
        return None
    observer.stage("measuring latency")
    models = {
        "dense": copied(dense, sharing=dense.parameters()).cpu().eval(),
        "compact": copied(compact, sharing=compact.parameters()).eval(),
    }
    found = latencies(models, to_device(batch.arguments, torch.device("cpu")))
    return Latency(found["dense"], found["compact"], f"one call of the model, {LATENCY_OF}")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """A model's state on the CPU, in memory of its own; a tensor under two names is one tensor still."""
    copies: dict[Any, Tensor] = {}
    state: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            state[name] = value
            continue
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if key not in copies:
            copies[key] = value.detach().clone().cpu()
        state[name] = copies[key]
    return state


class Clock:
    """Seconds spent, by the names of stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what passes under a name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)

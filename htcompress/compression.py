"""From a trained model to a compact one and its report: start reading here.

`compress` and `convert` are the same stages in order, each a function of `htcompress.stages`: open, find and prove the
layers, observe them on data, plan, build, fine-tune, read back, report. `save` writes the directory; what goes on from
there (`finetune`, `evaluate`) is in `htcompress.continuing`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from htcompress.data import Data, Peeked
from htcompress.directory.read import config_of
from htcompress.directory.write import write_directory
from htcompress.errors import CheckpointError
from htcompress.finetuning.objective import TaskLoss
from htcompress.isolation import restored, seeded
from htcompress.model.inventory import inventory, names_of, tensor_names
from htcompress.model.loading import tell_of_others
from htcompress.model.names import renamed
from htcompress.model.proof import prove, without_unseen
from htcompress.model.reparametrised import plain_tensors, with_plain_weights
from htcompress.model.replace import copied, stand_ins
from htcompress.model.selection import assumed_settings, module_names, scripted, selected
from htcompress.model.sharing import further_names, shared_weights, told
from htcompress.nn.recurrent import HTRecurrent
from htcompress.numbers import budget_of
from htcompress.observer import Observer
from htcompress.opening import dense_model, device_named, places_of
from htcompress.planning import Plan
from htcompress.report import Quality, Report, Timings, words
from htcompress.report.build import Counted, layer_reports, totals_of
from htcompress.request import FineTuning, Goal, Request
from htcompress.sources.read import Checkpoint, read_checkpoint
from htcompress.stages import (
    Clock,
    arranged,
    compact_model,
    kept_if_better,
    latency_of,
    measured,
    observed,
    planned,
    read_back,
    snapshot,
    tell_if_in_vain,
    training_batches,
    tried,
    tuned,
)
from htcompress.task import Task, load_task
from htcompress.vocabulary import Format, LayoutKind, Scope, UnitOrder, one_of

Evaluate = Callable[[nn.Module], Mapping[str, float] | float]

__all__ = ["Compressed", "Opened", "compress", "compressed_model", "converted", "save", "save_pretrained"]


@dataclass(frozen=True, eq=False)
class Compressed:
    """The result of a compression.

    Attributes:
        model: the compact model, in evaluation mode; None where only a state_dict was given.
        modules: the recurrent modules in HT form, by name.
        tensors: the state of the model by name as it is to be written, HT cores in place of the dense recurrent
            weights; modules' extra state is in it too.
        report: what was asked, what came of it.
        config: what `config.json` holds.
        files: further files of an output directory, by name.
    """

    model: nn.Module | None
    modules: dict[str, HTRecurrent]
    tensors: dict[str, Any]
    report: Report
    config: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the output directory; see `save`."""
        save(self, directory)


def compress(
    model: nn.Module,
    *,
    budget: int | str | None = None,
    error: float | None = None,
    ratio: float | None = None,
    scope: Scope | str = Scope.AUTO,
    layout: LayoutKind | str = LayoutKind.AUTO,
    format: Format | str = Format.HT,
    unit_order: UnitOrder | str = UnitOrder.AUTO,
    bits: int | None = None,
    layers: str = "*",
    calibration: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    training: Callable[[], Iterable[Any]] | Iterable[Any] | None = None,
    unlabelled: Callable[[], Iterable[Any]] | Iterable[Any] | None = None,
    loss: TaskLoss | None = None,
    evaluate: Evaluate | None = None,
    higher_is_better: bool | None = None,
    finetuning: FineTuning | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> Compressed:
    """Compress the recurrent layers of a trained model.

    >>> import torch, htcompress
    >>> result = htcompress.compress(torch.nn.LSTM(64, 32), budget=2000)
    >>> result.report.totals.parameters_after <= 2000
    True

    Args:
        model: the trained dense model; it is not changed, and neither is its mode.
        budget: stored numbers of the recurrent layers, biases included, that are not exceeded; or bytes: `"20kB"`.
        error: instead, the relative error of each weight matrix that is not exceeded.
        ratio: instead, how many times fewer numbers than now.
        scope: `auto`, `integrated`, `separate` or `input`.
        layout: `auto`, `split`, `paired` or `svd`.
        format: `ht`, or for comparison `tt`, `tr`, `bt` or `svd`.
        unit_order: how hidden units are ordered to fold well: `auto`, `readers` or `keep` (see `UnitOrder`).
        bits: in which each number is stored, at most: 32 (in the model's precision), 16, or 8 to 2 with scales. None:
            32, or under a budget of bytes whatever is best for each matrix.
        layers: which recurrent modules, as a glob over their names; others stay dense.
        calibration: inputs of the model, batch by batch (a tuple is its positional arguments), or a function
            that yields them: the decomposition is weighed by them, and stand-ins for layers are tried on them.
        training: `(inputs, target)` batches, or a function that yields a pass of them: fine-tunes.
        unlabelled: further inputs to fine-tune on, one batch for each of `training`.
        loss: of output and target, in addition to distillation.
        evaluate: of a model, a metric or a dict of metrics whose first is the headline. It is given a copy.
        higher_is_better: what the metric means; needed where its name speaks of an error.
        finetuning: how to fine-tune.
        seed: of everything that is drawn at random.

    Returns:
        the compact model, its modules and its report. Layers for which no drop-in can stand are as they were; the
        report names them.

    Raises:
        RequestError: the goal or an option makes no sense.
        CheckpointError: the model has no recurrent layers that can be compressed, or weights that are not finite.
        TaskError: the data does not fit the model, or cannot be trained on.
        UnreachableError: the budget is too small for any form; the message says what is enough.
    """
    forms = one_of(Scope, scope, "scope"), one_of(LayoutKind, layout, "layout"), one_of(Format, format, "format")
    numbers, stored = budget_of(budget, "budget")
    goal = Goal(numbers, error, ratio, *forms, one_of(UnitOrder, unit_order, "unit_order"), bits, stored)
    request = Request(goal, layers, finetuning or FineTuning(seed=seed), seed)
    data = Data.of_arguments(calibration, training, unlabelled, loss, evaluate, higher_is_better)
    source = {"file": type(model).__name__, "sha256": None, "path": None}
    with restored():
        observer = observer or Observer()
        private = copied(model, sharing=model.parameters()).eval()
        for sentence in with_plain_weights(private):
            observer.message(sentence)
        opened_model = Opened(private, lambda: copied(model), private.state_dict(), source)
        return compressed_model(opened_model, request, data, observer)


def converted(
    checkpoint: str | Path, request: Request, *, task: Task | None = None, observer: Observer | None = None
) -> Compressed:
    """What a request makes of a checkpoint file; see `convert`. `task` stands in for the one that it names."""
    observer = observer or Observer()
    with restored():
        device = device_named(request.device)
        if task is None and request.task is not None:
            task = load_task(request.task)
        observer.stage("reading the checkpoint")
        read = read_checkpoint(checkpoint, weights=request.weights, names=request.names)
        source = {"file": read.path.name, "sha256": read.sha256, "path": str(checkpoint)}
        if request.weights is not None:
            source["weights"] = request.weights
        if task is None:
            tell_of_others(read, observer)
            return _of_tensors(read, source, request, observer)
        model = dense_model(task, read, observer).to(device)
        own = model.state_dict()
        stored = renamed({**read.tensors, **read.extra}, list(own))
        before = {name: stored.get(name, own[name]) for name in own}
        opened_model = Opened(model, lambda: task.model().to(device), before, source)
        _tell(read.left, observer)
        made = compressed_model(opened_model, request, Data.of_task(task).on(device), observer)
        return replace(made, report=replace(made.report, left={**read.left, **made.report.left}))


@dataclass(frozen=True, eq=False)
class Opened:
    """A trained model, ready to be compressed.

    Attributes:
        model: the dense model, private to this run, in evaluation mode.
        fresh: makes another instance of it, into which what would be written is read back.
        before: its state as it was stored.
        source: what the report says of where it came from.
    """

    model: nn.Module
    fresh: Callable[[], nn.Module]
    before: Mapping[str, Any]
    source: dict[str, Any]


def compressed_model(opened_model: Opened, request: Request, data: Data, observer: Observer) -> Compressed:
    """Prove, observe, plan, build, fine-tune, read back, evaluate, report."""
    model, goal, seed = opened_model.model, request.goal, request.seed
    tuning = request.finetuning
    names = selected(module_names(model), request.layers, source="The model", hint=scripted(model))
    clock = Clock()
    with clock("evaluate"):
        quality = measured(Quality(), "dense", model, data, seed, observer)
    calibration = None if data.calibration is None else Peeked(data.calibration)
    trains = data.training is not None and tuning is not None and tuning.trains
    training = Peeked(data.training) if trains and data.training is not None else None
    with clock("statistics"), seeded(seed):
        observer.stage("trying stand-ins")
        batch = tried(model, data, calibration, training)
        proof = prove(model, names, *(() if batch is None else (batch.arguments, batch.answer)))
        statistics = None
        # An error goal is about the weights: data would not change what is asked.
        if calibration is not None and batch is not None and goal.error is None:
            statistics = observed(model, proof, calibration, batch, seed, observer)
        if statistics is not None:
            proof = without_unseen(model, proof, statistics)
        _tell(proof.left, observer)
        if not proof.names:
            reasons = " ".join(words.left(proof.left))
            raise CheckpointError(f"None of the recurrent layers can be compressed. {reasons}")
        owners = {**proof.tied, **further_names(model, [*proof.names, *proof.tied])}
        owners = {name: proof.tied.get(owner, owner) for name, owner in owners.items()}
        shared = shared_weights(dict(model.named_parameters(remove_duplicate=False)), proof.names, owners)
        for sentence in told(shared):
            observer.message(sentence)
        batches = None if training is None else training_batches(model, data, training, batch)
    dense = arranged(model, proof, statistics, batch, goal, calibration)
    with clock("decompose"):
        plan = planned(dense.layers, goal, dense.statistics, dense.orders, observer)
    compact, modules = compact_model(dense.model, plan, proof.tied)
    moved = dense.moved or {}
    config = config_of({name: modules[name] for name in proof.names}, tied=owners, orders=moved, shared=shared)
    config = json.loads(json.dumps(config))
    stage = "decomposed"
    if batches is not None and tuning is not None:
        with clock("evaluate"):
            quality = measured(quality, "decomposed", compact, data, seed, observer)
        with clock("finetune"):
            # The teacher is the model as it was given, whose units stand elsewhere where they were moved.
            places = places_of(config)
            before = None if data.judge is None else snapshot(compact)
            histories = [tuned(compact, model, batches, data, tuning, observer, places)]
            if data.following is not None:
                further = training_batches(model, data, Peeked(data.following(compact)), batch)
                histories.append(tuned(compact, model, further, data, tuning, observer, places))
            tell_if_in_vain(histories, observer)
            if data.judge is not None and before is not None:
                kept_if_better(compact, before, data.judge, observer)
        stage = "finetuned"
    state = snapshot(compact)
    arguments = None if batch is None else batch.arguments
    result = read_back(config, state, opened_model.fresh(), compact, arguments)
    with clock("evaluate"):
        quality = measured(quality, stage, result, data, seed, observer)
    result = result.cpu()
    own = {name: module for name, module in stand_ins(result).items() if name in proof.names}
    counted = Counted.of(dense.layers, opened_model.before, state)
    made = _report(plan, own, counted, opened_model.source, request, data, proof.left, moved)
    timings = Timings(
        clock.seconds.get("statistics") if statistics is not None else None,
        clock.seconds.get("decompose"),
        clock.seconds.get("finetune"),
        clock.seconds.get("evaluate") if data.evaluate is not None else None,
    )
    latency = latency_of(model, result, batch, observer)
    return Compressed(result, own, state, replace(made, quality=quality, timings_s=timings, latency=latency), config)


def _of_tensors(checkpoint: Checkpoint, source: dict[str, Any], request: Request, observer: Observer) -> Compressed:
    """Plan and build from the weights alone."""
    left: dict[str, str] = {**checkpoint.left}
    checkpoint = replace(checkpoint, tensors=plain_tensors(checkpoint.tensors))
    every = inventory(checkpoint.tensors, source=str(checkpoint.path), on_left=left.__setitem__)
    names = {layer.name: names_of(layer, checkpoint.tensors) for layer in every}
    layers = [layer for layer in every if layer.name in selected(names, request.layers)]
    left = {name: reason for name, reason in left.items() if fnmatchcase(name, request.layers)}
    _tell(left, observer)
    clock = Clock()
    with clock("decompose"):
        plan = planned(layers, request.goal, None, None, observer)
    modules = {layer.name: layer.build() for layer in plan.layers}
    tensors: dict[str, Any] = {**checkpoint.tensors, **checkpoint.extra}
    for layer in layers:
        for name in names[layer.name]:
            for dense in tensor_names(layer, name):
                del tensors[dense]
            cores = modules[layer.name].state_dict()
            tensors |= {f"{name}.{key}" if name else key: core for key, core in cores.items()}
    tied = {other: layer.name for layer in layers for other in names[layer.name][1:]}
    assumed = {layer.name: assumed_settings(layer.settings) for layer in layers}
    shared = shared_weights(checkpoint.tensors, [layer.name for layer in layers], tied)
    for sentence in told(shared):
        observer.message(sentence)
    counted = Counted.of(layers, checkpoint.tensors, tensors)
    made = _report(plan, modules, counted, source, request, Data(), left)
    made = replace(made, timings_s=Timings(decompose=clock.seconds.get("decompose")))
    return Compressed(None, modules, tensors, made, config_of(modules, tied=tied, assumed=assumed, shared=shared))


def _report(
    plan: Plan,
    modules: Mapping[str, HTRecurrent],
    counted: Counted,
    source: dict[str, Any],
    request: Request,
    data: Data,
    left: Mapping[str, str],
    moved: Mapping[str, Any] | None = None,
) -> Report:
    totals = totals_of(modules, counted)
    goal = request.goal
    if goal.budget is not None and totals.parameters_after > goal.budget:
        raise RuntimeError(f"{totals.parameters_after} numbers exceed the budget of {goal.budget}.")
    if goal.bytes is not None and totals.bytes_after > goal.bytes:
        raise RuntimeError(f"{totals.bytes_after} bytes exceed the budget of {goal.bytes}.")
    asked = request if data.training is not None else replace(request, finetuning=None)
    return Report(
        version=version("htcompress"),
        source=source,
        seed=request.seed,
        request=asked.to_report(),
        totals=totals,
        layers=layer_reports(plan.layers, modules, tuple(moved or ())),
        quality=Quality(),
        timings_s=Timings(),
        frontier=plan.frontier,
        left=dict(left),
    )


def save(compressed: Compressed, directory: str | Path) -> None:
    """Write the output directory: `model.safetensors`, `config.json`, the report, a model card.

    It appears whole or not at all; an older output directory in its place is replaced.

    Raises:
        RequestError: the place cannot be written, or holds something else.
    """
    place = Path(directory)
    path = compressed.report.source.get("path")
    relative = None if path is None else os.path.relpath(path, place)
    report = replace(compressed.report, source={**compressed.report.source, "path": relative})
    write_directory(place, compressed.tensors, compressed.config, report, files=compressed.files)


def save_pretrained(compressed: Compressed, directory: str | Path) -> None:
    """`save`, by the name that users of Hugging Face's libraries know."""
    save(compressed, directory)


def _tell(left: Mapping[str, str], observer: Observer) -> None:
    for sentence in words.left(left):
        observer.message(sentence)

"""The main job: a trained dense model in, a compact model and its report out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from htcompress.checkpoint.directory import load, read_config, read_state
from htcompress.checkpoint.loading import load_checkpoint, tell_of_others
from htcompress.checkpoint.names import listed, own_names, renamed
from htcompress.checkpoint.read import Checkpoint, read_checkpoint
from htcompress.checkpoint.writing import write_directory
from htcompress.data import Data, Peeked, training_reading
from htcompress.errors import RequestError, TaskError
from htcompress.finetuning.distill import FineTuning
from htcompress.finetuning.objective import TaskLoss
from htcompress.formats import Format
from htcompress.isolation import restored, seeded
from htcompress.matrix import LayoutKind
from htcompress.nn.plain import without_packing
from htcompress.nn.replace import copied, stand_ins
from htcompress.observer import Observer
from htcompress.planning import Goal, Scope, UnitOrder
from htcompress.report import Report, read_report
from htcompress.stages import Compressed, Run, snapshot
from htcompress.task import Task, load_task

Evaluate = Callable[[nn.Module], Mapping[str, float] | float]
AnyKind = TypeVar("AnyKind", bound=StrEnum)

__all__ = ["Compressed", "compress", "convert", "evaluate", "finetune", "save"]


def compress(
    model: nn.Module,
    *,
    budget: int | None = None,
    error: float | None = None,
    ratio: float | None = None,
    scope: Scope | str = Scope.AUTO,
    layout: LayoutKind | str = LayoutKind.AUTO,
    format: Format | str = Format.HT,
    unit_order: UnitOrder | str = UnitOrder.AUTO,
    layers: str = "*",
    calibration: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    training: Callable[[], Iterable[Any]] | Iterable[Any] | None = None,
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
        budget: stored numbers of the recurrent layers, biases included, that are not exceeded.
        error: instead, the relative error of each weight matrix that is not exceeded.
        ratio: instead, how many times fewer numbers than now.
        scope: `auto`, `integrated`, `separate` or `input`.
        layout: `auto`, `split`, `paired` or `svd`.
        format: `ht`, or for comparison `tt`, `tr`, `bt` or `svd`.
        unit_order: how hidden units are ordered to fold well: `auto`, `readers` or `keep` (see `UnitOrder`).
        layers: which recurrent modules, as a glob over their names; others stay dense.
        calibration: inputs of the model, batch by batch (a tuple is its positional arguments), or a function
            that yields them: the decomposition is weighed by them, and stand-ins for layers are tried on them.
        training: `(inputs, target)` batches, or a function that yields a pass of them: fine-tunes.
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
    goal = Goal(budget, error, ratio, *forms, one_of(UnitOrder, unit_order, "unit_order"))
    data = Data.of_arguments(calibration, training, loss, evaluate, higher_is_better)
    run = Run(goal, layers, data, finetuning or FineTuning(seed=seed), seed, observer or Observer())
    source = {"file": type(model).__name__, "sha256": None, "path": None}
    with restored():
        private = copied(model, sharing=model.parameters()).eval()
        return run.with_model(private, lambda: copied(model), model.state_dict(), source, task=None)


def convert(
    checkpoint: str | Path,
    *,
    goal: Goal,
    task: str | Path | None = None,
    layers: str = "*",
    weights: str | None = None,
    finetuning: FineTuning | None = None,
    seed: int = 0,
    device: str = "cpu",
    observer: Observer | None = None,
) -> Compressed:
    """Compress the recurrent layers of a checkpoint file; what `htcompress convert` does.

    Args:
        checkpoint: a state_dict in `.pt`, `.pth`, `.ckpt` or `.safetensors`.
        goal: the budget, the error or the ratio; the scope and the layout.
        task: a task file or module; without one the weights alone are worked from.
        weights: the state_dict to take of a file that holds several, such as `state_dict_ema`.
        finetuning: how to fine-tune; None: not at all.
        device: where calibration, fine-tuning and evaluation run.

    Raises:
        HTCompressError: as `compress`, and `CheckpointError`, `TaskError` for the files.
    """
    observer = observer or Observer()
    with restored():
        where = _device(device)
        loaded = None if task is None else load_task(task)
        observer.stage("reading the checkpoint")
        read = read_checkpoint(checkpoint, weights=weights)
        source = {"file": read.path.name, "sha256": read.sha256, "path": str(checkpoint)}
        if weights is not None:
            source["weights"] = weights
        data = Data() if loaded is None else Data.of_task(loaded)
        if finetuning is None:
            data = replace(data, training=None)
        run = Run(goal, layers, data.on(where), finetuning or FineTuning(), seed, observer)
        if loaded is None:
            tell_of_others(read, observer)
            return run.with_tensors(read, source)
        model = dense_model(loaded, read, observer).to(where)
        own = model.state_dict()
        stored = renamed({**read.tensors, **read.extra}, list(own))
        before = {name: stored.get(name, own[name]) for name in own}
        return run.with_model(model, lambda: loaded.model().to(where), before, source, task=str(task))


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
    write_directory(place, compressed.tensors, compressed.config, report)


def finetune(
    directory: str | Path,
    *,
    task: str | Path,
    teacher: str | Path | None = None,
    options: FineTuning | None = None,
    device: str = "cpu",
    observer: Observer | None = None,
) -> Compressed:
    """Continue fine-tuning of an output directory; the result is not written (see `save`).

    The teacher is the dense checkpoint that the directory was made from, found by the path kept in its
    report. Without it the task's own loss is all there is to train on.

    Raises:
        TaskError: the task lacks what fine-tuning needs.
        CheckpointError: the directory or the teacher cannot be read.
    """
    observer = observer or Observer()
    place = Path(directory)
    with restored():
        where = _device(device)
        config = read_config(place)
        report = read_report(place)
        loaded = load_task(task)
        data = Data.of_task(loaded).on(where)
        if data.training is None:
            loaded.require("training", purpose="fine-tuning")
            raise TaskError(f"The task {loaded.source} has nothing to fine-tune on.")
        observer.stage("reading the directory")
        model = _opened(place, loaded, observer).to(where)
        dense = _teacher(place, report, teacher, loaded, observer)
        if dense is not None:
            dense = dense.to(where)
        options = options or FineTuning()
        run = Run(Goal(budget=1), "*", data, options, options.seed, observer)
        quality = report.quality
        if data.evaluate is None and quality.final is not None:
            observer.message(f"{loaded.source} has no evaluate(): the fine-tuned model is not measured.")
            quality = replace(quality, decomposed=None, finetuned=None)
        elif quality.final is None:
            quality = run.measured(quality, "decomposed", model)
        with seeded(options.seed):
            training = Peeked(data.training)
            if training.empty:
                raise TaskError(f"training() in {loaded.source} yields nothing; it must yield batches.")
            reading = training_reading(model, training.first, loss=data.loss)
        arguments, _ = reading(training.first)
        spent = run.tuned(model, dense, lambda: map(reading, training()), _places(config))
        # Tensors that the model does not know stay in the directory.
        state = read_state(place) | snapshot(model)
        result = run.read_back(config, state, loaded.model().to(where), model, arguments)
        quality = run.measured(quality, "finetuned", result)
        if dense is not None and quality.dense is None:
            quality = run.measured(quality, "dense", dense)
        timings = replace(report.timings_s, finetune=round((report.timings_s.finetune or 0.0) + spent, 3))
        done = replace(report, quality=quality, timings_s=timings)
        path = report.source.get("path")
        if path is not None:
            done = replace(done, source={**done.source, "path": str(place / path)})
        result = result.cpu()
        modules = {name: module for name, module in stand_ins(result).items() if name in config["layers"]}
        kept = {name: value for name, value in config.items() if name != "extra"}
        return Compressed(result, modules, state, done, kept)


def evaluate(
    source: str | Path,
    *,
    task: str | Path,
    weights: str | None = None,
    device: str = "cpu",
    observer: Observer | None = None,
) -> dict[str, float]:
    """The task's metrics of an output directory or of a dense checkpoint; the first is the headline.

    Args:
        weights: the state_dict to take of a checkpoint that holds several.
    """
    observer = observer or Observer()
    with restored():
        where = _device(device)
        loaded = load_task(task)
        loaded.require("evaluate", purpose="evaluation")
        place = Path(source)
        if place.is_dir():
            model = _opened(place, loaded, observer)
        else:
            model = dense_model(loaded, read_checkpoint(place, weights=weights), observer)
        observer.stage("evaluating")
        model = model.to(where).eval()
        with seeded(0), without_packing(model):
            return loaded.evaluate(model)


def dense_model(task: Task, checkpoint: Checkpoint, observer: Observer) -> nn.Module:
    """The task's model with the checkpoint's tensors in it; see `load_checkpoint`."""
    return load_checkpoint(task.model(), checkpoint, observer, source=task.source)


def one_of(kind: type[AnyKind], value: AnyKind | str, name: str) -> AnyKind:
    """The member of an enumeration that a word stands for. Raises `RequestError` where there is none."""
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"{name} is one of {', '.join(kind)}; found {str(value)!r}.") from None


def _places(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where a layer's outputs stand that are put out in another order than the dense model's."""
    found = {}
    for name, layer in config["layers"].items():
        settings = layer["settings"]
        if "units" not in layer or settings.get("proj_size"):
            continue
        size, last = settings["hidden_size"], settings["num_layers"] - 1
        names = [f"l{last}", f"l{last}_reverse"] if not settings["cell"] else ["cell"]
        parts = []
        for index, slot in enumerate(names[: 2 if settings["bidirectional"] else 1]):
            order = torch.tensor(layer["units"].get(slot, list(range(size))))
            parts.append(torch.argsort(order) + index * size)
        found[name] = torch.cat(parts)
    return found


def _opened(place: Path, task: Task, observer: Observer) -> nn.Module:
    """An output directory in the task's model; tensors that the model does not know are named in a message."""
    model = load(place, task.model(), strict=False)
    own = own_names(model)
    unknown = [name for name in renamed(read_state(place), own) if name not in own]
    if unknown:
        observer.message(f"{len(unknown)} tensors of {place} are unknown to model(): {listed(unknown)}.")
    return model


def _teacher(place: Path, report: Report, given: str | Path | None, task: Task, observer: Observer) -> nn.Module | None:
    weights = report.source.get("weights")
    if given is not None:
        return dense_model(task, read_checkpoint(given, weights=weights), observer)
    path = report.source.get("path")
    if path is not None and (place / path).is_file():
        found = read_checkpoint(place / path, weights=weights)
        if found.sha256 == report.source["sha256"]:
            return dense_model(task, found, observer)
        observer.message(f"{place / path} is no longer the checkpoint that {place} was made from; it is not used.")
    if not task.has("loss") or not task.has("training"):
        raise TaskError(
            f"The dense checkpoint {report.source['file']} that {place} was made from is not found, and {task.source} "
            f"has no training() and loss() to train on without it. Give the checkpoint with --teacher."
        )
    observer.message(f"The dense checkpoint {report.source['file']} is not found: training on the task's loss alone.")
    return None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"The device {name!r} is not there: {str(error).splitlines()[0]}. Try cpu.") from error
    return device

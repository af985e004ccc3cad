"""The main job: a trained dense model in, a compact model and its report out."""

from __future__ import annotations

import copy
import fnmatch
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from htcompress.checkpoint.directory import config_of, load, read_config, read_tensors, write_directory
from htcompress.checkpoint.inventory import inventory, inventory_of_model, names_of, same_memory, tensor_names
from htcompress.checkpoint.read import Checkpoint, read_checkpoint
from htcompress.errors import CheckpointError, RequestError, TaskError
from htcompress.finetuning.distill import Batches, FineTuning, Progress, distill, evaluating
from htcompress.finetuning.objective import TaskLoss
from htcompress.formats import Format
from htcompress.matrix import LayoutKind
from htcompress.nn.dense import DenseLayer
from htcompress.nn.latency import LATENCY_OF, latencies
from htcompress.nn.plain import without_packing
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.replace import recurrent_modules, replace_modules
from htcompress.observer import Observer
from htcompress.planning import Goal, ModelPlan, Scope, plan_model
from htcompress.planning.units import arrange_units
from htcompress.report import Latency, Quality, Report, Timings, read_report
from htcompress.report.build import layer_reports, request_of, totals_of
from htcompress.statistics.collect import SlotStatistics, collect
from htcompress.task import Task, arguments, load_task, metrics_of, output_of, training_item

Evaluate = Callable[[nn.Module], Mapping[str, float] | float]
AnyKind = TypeVar("AnyKind", bound=StrEnum)

_LARGE = 1 << 20


@dataclass(frozen=True, eq=False)
class Compressed:
    """The result of a compression.

    Attributes:
        model: the compact model; None where only a state_dict was given.
        modules: the recurrent modules in HT form, by name.
        tensors: every tensor of the model by name, HT cores in place of the dense recurrent weights.
        report: what was asked, what came of it.
    """

    model: nn.Module | None
    modules: dict[str, HTRecurrent]
    tensors: dict[str, Tensor]
    report: Report

    @property
    def config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return config_of(self.modules)


@dataclass(frozen=True, eq=False)
class _Data:
    """The user's data and metric, from a task or from arguments of `compress`; None where not given."""

    calibration: Callable[[], Iterator[tuple[Any, ...]]] | None = None
    training: Batches | None = None
    loss: TaskLoss | None = None
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    higher_is_better: bool = True

    @classmethod
    def of_task(cls, task: Task) -> _Data:
        return cls(
            task.calibration if task.has("calibration") else None,
            task.training if task.can_train else None,
            task.loss,
            task.evaluate if task.has("evaluate") else None,
            task.higher_is_better,
        )

    def on(self, device: torch.device) -> _Data:
        """The same with every batch on a device."""
        calibration, training = self.calibration, self.training
        return replace(
            self,
            calibration=None if calibration is None else lambda: (to_device(item, device) for item in calibration()),
            training=None if training is None else lambda: (to_device(item, device) for item in training()),
        )


def compress(
    model: nn.Module,
    *,
    budget: int | None = None,
    error: float | None = None,
    ratio: float | None = None,
    scope: Scope | str = Scope.AUTO,
    layout: LayoutKind | str = LayoutKind.AUTO,
    format: Format | str = Format.HT,
    layers: str = "*",
    calibration: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    training: Callable[[], Iterable[Any]] | Iterable[Any] | None = None,
    loss: TaskLoss | None = None,
    evaluate: Evaluate | None = None,
    higher_is_better: bool = True,
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
        model: the trained dense model; it is not changed.
        budget: stored numbers of the recurrent layers, biases included, that are not exceeded.
        error: instead, the relative error of each weight matrix that is not exceeded.
        ratio: instead, how many times fewer numbers than now.
        scope: `auto`, `integrated`, `separate` or `input`.
        layout: `auto`, `split`, `paired` or `svd`.
        format: `ht`, or for comparison `tt`, `tr`, `bt` or `svd`.
        layers: which recurrent modules, as a glob over their names; others stay dense.
        calibration: inputs of the model, batch by batch (a tuple is its positional arguments), or a function
            that yields them: the decomposition is weighed by them.
        training: `(inputs, target)` batches, or a function that yields a pass of them: fine-tunes.
        loss: of output and target, in addition to distillation.
        evaluate: of a model, a metric or a dict of metrics whose first is the headline.
        higher_is_better: what the metric means.
        finetuning: how to fine-tune.
        seed: of everything that is drawn at random.

    Returns:
        the compact model, its modules and its report.

    Raises:
        RequestError: the goal or an option makes no sense.
        CheckpointError: the model has no recurrent layers, or weights that are not finite.
        TaskError: the data does not fit the model, or cannot be trained on.
        UnreachableError: the budget is too small for any form; the message says what is enough.
    """
    forms = one_of(Scope, scope, "scope"), one_of(LayoutKind, layout, "layout"), one_of(Format, format, "format")
    goal = Goal(budget, error, ratio, *forms)
    data = _Data(
        None if calibration is None else lambda: map(arguments, _restarted(calibration)),
        None if training is None else lambda: map(training_item, _restarted(training)),
        loss,
        None if evaluate is None else lambda m: metrics_of(evaluate(m), source="compress"),
        higher_is_better,
    )
    run = _Run(goal, layers, data, finetuning or FineTuning(seed=seed), seed, observer or Observer())
    source = {"file": type(model).__name__, "sha256": None, "path": None}
    with evaluating(model):
        return run.with_model(model, model.state_dict(), source, task=None)


def convert(
    checkpoint: str | Path,
    *,
    goal: Goal,
    task: str | Path | None = None,
    layers: str = "*",
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
        finetuning: how to fine-tune; None: not at all.
        device: where calibration, fine-tuning and evaluation run.

    Raises:
        HTCompressError: as `compress`, and `CheckpointError`, `TaskError` for the files.
    """
    observer = observer or Observer()
    where = _device(device)
    loaded_task = None if task is None else load_task(task)
    observer.stage("reading the checkpoint")
    read = read_checkpoint(checkpoint)
    source = {"file": read.path.name, "sha256": read.sha256, "path": str(checkpoint)}
    data = _Data() if loaded_task is None else _Data.of_task(loaded_task)
    if finetuning is None:
        data = replace(data, training=None)
    run = _Run(goal, layers, data.on(where), finetuning or FineTuning(), seed, observer)
    if loaded_task is None:
        return run.with_tensors(read, source)
    model = dense_model(loaded_task, read, observer).to(where)
    own = model.state_dict()
    stored = _without_prefix(read.tensors, own)
    return run.with_model(model, {name: stored.get(name, own[name]) for name in own}, source, task=str(task))


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
    where = _device(device)
    place = Path(directory)
    read_config(place)
    report = read_report(place)
    loaded = load_task(task)
    data = _Data.of_task(loaded).on(where)
    if data.training is None:
        loaded.require("training", purpose="fine-tuning")
    observer.stage("reading the directory")
    model = _opened(place, loaded, observer).to(where)
    dense = _teacher(place, report, teacher, loaded, observer)
    if dense is not None:
        dense = dense.to(where)
    options = options or FineTuning()
    if any(layer.units_reordered for layer in report.layers):
        # The states stand in another order than those of the dense checkpoint.
        options = replace(options, hidden=0.0)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, HTRecurrent)}
    run = _Run(Goal(budget=1), "*", data, options, options.seed, observer)
    quality = report.quality
    if data.evaluate is None and quality.final is not None:
        observer.message(f"{loaded.source} has no evaluate(): the fine-tuned model is not measured.")
        quality = replace(quality, decomposed=None, finetuned=None)
    elif quality.final is None:
        quality = run.measured(quality, "decomposed", model)
    spent = run.tuned(model, dense)
    quality = run.measured(quality, "finetuned", model)
    if dense is not None and quality.dense is None:
        quality = run.measured(quality, "dense", dense)
    timings = replace(report.timings_s, finetune=round((report.timings_s.finetune or 0.0) + spent, 3))
    done = replace(report, quality=quality, timings_s=timings)
    path = report.source.get("path")
    if path is not None:
        done = replace(done, source={**done.source, "path": str(place / path)})
    model = model.cpu()
    # Tensors that the model does not know stay in the directory.
    return Compressed(model, modules, read_tensors(place) | dict(model.state_dict()), done)


def evaluate(
    source: str | Path, *, task: str | Path, device: str = "cpu", observer: Observer | None = None
) -> dict[str, float]:
    """The task's metrics of an output directory or of a dense checkpoint; the first is the headline."""
    observer = observer or Observer()
    where = _device(device)
    loaded = load_task(task)
    loaded.require("evaluate", purpose="evaluation")
    place = Path(source)
    if place.is_dir():
        model = _opened(place, loaded, observer)
    else:
        model = dense_model(loaded, read_checkpoint(place), observer)
    observer.stage("evaluating")
    model = model.to(where).eval()
    with without_packing(model):
        return loaded.evaluate(model)


def dense_model(task: Task, checkpoint: Checkpoint, observer: Observer) -> nn.Module:
    """The task's model with the checkpoint's tensors in it.

    Raises `CheckpointError` where the checkpoint lacks a tensor or a shape differs; tensors that the
    model does not know are named in a message.
    """
    model = task.model()
    own = model.state_dict()
    tensors = _without_prefix(checkpoint.tensors, own)
    # A file may keep a tensor that the model holds twice under one name only.
    here = [tensor for name, tensor in own.items() if name in tensors]
    missing = [n for n, t in own.items() if n not in tensors and not any(same_memory(t, other) for other in here)]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(own)} tensors of model() in {task.source}: "
            f"{_listed(missing)}. Give the checkpoint of this model, or correct model()."
        )
    for name, tensor in own.items():
        if name in tensors and tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {tuple(tensors[name].shape)}; model() in {task.source} has "
                f"{tuple(tensor.shape)}. Give the checkpoint of this model, or correct model()."
            )
    unknown = [name for name in tensors if name not in own]
    if unknown:
        observer.message(f"{len(unknown)} tensors of {checkpoint.path} are unknown to model(): {_listed(unknown)}.")
    # Large recurrent weights stay where they are, in the mapped file; the rest is copied as ever.
    mapped = _large_weights(model, tensors)
    for name, parameter in mapped.items():
        parameter.data = tensors[name]
    model.load_state_dict({n: tensors[n] for n in own if n in tensors and n not in mapped}, strict=False)
    return model.eval()


def _large_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The recurrent weights of a million numbers and more that a checkpoint holds just as the model does."""
    found = {}
    for name, module in recurrent_modules(model).items():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            stored = tensors.get(full)
            if stored is not None and parameter.numel() >= _LARGE and stored.dtype == parameter.dtype:
                found[full] = parameter
    return found


def one_of(kind: type[AnyKind], value: AnyKind | str, name: str) -> AnyKind:
    """The member of an enumeration that a word stands for. Raises `RequestError` where there is none."""
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"{name} is one of {', '.join(kind)}; found {str(value)!r}.") from None


def selected(layers: list[DenseLayer], pattern: str) -> list[DenseLayer]:
    """The layers whose names match a glob. Raises `RequestError` where none does."""
    chosen = [layer for layer in layers if fnmatch.fnmatchcase(layer.name, pattern)]
    if not chosen:
        names = ", ".join(repr(layer.name) for layer in layers)
        raise RequestError(f"--layers {pattern!r} matches none of the recurrent layers: {names}.")
    return chosen


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists, dicts and packed sequences moved to a device; anything else as it is."""
    if device.type == "cpu" and not torch.cuda.is_available():
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, PackedSequence):
        return value.to(device)  # type: ignore[arg-type]
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [to_device(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


@dataclass(frozen=True, eq=False)
class _Run:
    """One compression: the stages in order, with their times."""

    goal: Goal
    pattern: str
    data: _Data
    finetuning: FineTuning
    seed: int
    observer: Observer

    def with_tensors(self, checkpoint: Checkpoint, source: dict[str, Any]) -> Compressed:
        """Work from the weights alone."""
        layers = selected(inventory(checkpoint.tensors, source=str(checkpoint.path)), self.pattern)
        plan, seconds = self._planned(layers, None)
        modules = {layer.name: layer.build() for layer in plan.layers}
        tensors = dict(checkpoint.tensors)
        for layer in layers:
            for name in names_of(layer, checkpoint.tensors):
                for dense in tensor_names(layer, name):
                    del tensors[dense]
                cores = modules[layer.name].state_dict()
                tensors |= {f"{name}.{key}" if name else key: core for key, core in cores.items()}
        report = self._report(layers, plan, modules, checkpoint.tensors, tensors, source, None)
        report = replace(report, timings_s=Timings(decompose=seconds))
        return Compressed(None, modules, tensors, report)

    def with_model(
        self, model: nn.Module, before: Mapping[str, Tensor], source: dict[str, Any], *, task: str | None
    ) -> Compressed:
        """Calibrate, decompose, fine-tune, evaluate; `before` are the model's tensors as they were stored."""
        layers = selected(inventory_of_model(model), self.pattern)
        quality, evaluating = Quality(), time.perf_counter()
        quality = self.measured(quality, "dense", model)
        evaluated = time.perf_counter() - evaluating
        statistics, calibrating = None, None
        batch: tuple[Any, ...] | None = None
        reordered: tuple[str, ...] = ()
        # An error goal is about the weights: data would not change what is asked.
        if self.data.calibration is not None and self.goal.error is None:
            began = time.perf_counter()
            statistics, batch = self._statistics(model, [layer.name for layer in layers])
            if self.goal.folds:  # which folds nothing
                arranged = arrange_units(model, statistics, batch)
                model, statistics, reordered = arranged.model, arranged.statistics, arranged.layers
                layers = selected(inventory_of_model(model), self.pattern)
            calibrating = time.perf_counter() - began
        plan, decomposing = self._planned(layers, statistics)
        device = next(model.parameters()).device
        modules = {layer.name: layer.build().to(device) for layer in plan.layers}
        compact = replace_modules(model, modules).eval()
        began = time.perf_counter()
        quality = self.measured(quality, "decomposed", compact)
        evaluated += time.perf_counter() - began
        tuning = None
        if self.data.training is not None and self.finetuning.steps > 0:
            tuning = self.tuned(compact, model)
            began = time.perf_counter()
            quality = self.measured(quality, "finetuned", compact)
            evaluated += time.perf_counter() - began
        compact = compact.cpu()
        own = {name: m for name, m in compact.named_modules() if isinstance(m, HTRecurrent)}
        tensors = dict(compact.state_dict())
        report = self._report(layers, plan, own, before, tensors, source, task, reordered)
        timings = Timings(calibrating, decomposing, tuning, evaluated if self.data.evaluate is not None else None)
        rounded = Timings(*(None if t is None else round(t, 3) for t in vars(timings).values()))
        latency = self._latency(model if device.type == "cpu" else copy.deepcopy(model).cpu(), compact, batch)
        report = replace(report, quality=quality, timings_s=rounded, latency=latency)
        return Compressed(compact, own, tensors, report)

    def _latency(self, dense: nn.Module, compact: nn.Module, batch: tuple[Any, ...] | None) -> Latency | None:
        """How long a call takes, before and after; None without anything to call the models with."""
        if batch is None:
            return None
        self.observer.stage("measuring latency")
        cpu = torch.device("cpu")
        found = latencies({"dense": dense, "compact": compact}, to_device(batch, cpu))
        return Latency(found["dense"], found["compact"], f"one call of the model, {LATENCY_OF}")

    def _statistics(
        self, model: nn.Module, names: list[str]
    ) -> tuple[dict[str, dict[str, SlotStatistics]], tuple[Any, ...]]:
        """What was seen of the layers, and the last batch it was seen on."""
        assert self.data.calibration is not None
        self.observer.stage("calibrating")
        last: list[tuple[Any, ...]] = []

        def batches(source: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
            for item in source:
                last[:] = [item]
                yield item

        try:
            seen = collect(
                model,
                batches(self.data.calibration()),
                names=names,
                seed=self.seed,
                on_batch=self.observer.advance,
            )
            return seen, last[0]
        except TaskError:
            raise
        except Exception:
            # A batch that the dense model cannot take either is the task's fault, and told in the model's words.
            if last:
                with torch.no_grad():
                    output_of(model, last[0], source="calibration()")
            raise

    def _planned(
        self, layers: list[DenseLayer], statistics: Mapping[str, Mapping[str, SlotStatistics]] | None
    ) -> tuple[ModelPlan, float]:
        self.observer.stage("decomposing")
        began = time.perf_counter()
        with torch.no_grad():
            plan = plan_model(layers, self.goal, statistics)
        return plan, round(time.perf_counter() - began, 3)

    def measured(self, quality: Quality, stage: str, model: nn.Module) -> Quality:
        """The quality with one more stage, where there is a metric."""
        if self.data.evaluate is None:
            return quality
        self.observer.stage(f"evaluating the {stage} model")
        with without_packing(model):
            metrics = self.data.evaluate(model.eval())
        broken = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if broken and stage == "dense":
            raise TaskError(f"evaluate(model) gave {_listed(broken)} for the dense model; expected finite numbers.")
        if broken:
            self.observer.message(f"The {stage} model has {_listed(broken)}: it counts as not measured.")
            return quality
        return quality.with_stage(stage, metrics, higher_is_better=self.data.higher_is_better)

    def tuned(self, compact: nn.Module, teacher: nn.Module | None) -> float:
        """Fine-tune in place; the seconds it took."""
        assert self.data.training is not None
        began = time.perf_counter()
        self.observer.stage("fine-tuning", self.finetuning.steps)

        def show(progress: Progress) -> None:
            self.observer.advance(progress.step, f"loss {progress.loss:.3g}, best {progress.best:.3g}")

        distill(
            compact,
            teacher,
            self.data.training,
            loss=self.data.loss,
            options=self.finetuning,
            on_progress=show,
        )
        return round(time.perf_counter() - began, 3)

    def _report(
        self,
        layers: list[DenseLayer],
        plan: ModelPlan,
        modules: dict[str, HTRecurrent],
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        source: dict[str, Any],
        task: str | None,
        reordered: Collection[str] = (),
    ) -> Report:
        replaced = [before[name] for layer in layers for name in tensor_names(layer) if name in before]
        totals = totals_of(
            modules,
            bytes_before=sum(t.numel() * t.element_size() for t in replaced),
            model_before=sum(t.numel() for t in before.values()),
            model_after=sum(t.numel() for t in after.values()),
        )
        assert self.goal.budget is None or totals.parameters_after <= self.goal.budget
        tuning = None if self.data.training is None else self.finetuning
        return Report(
            version=version("htcompress"),
            source=source,
            seed=self.seed,
            request=request_of(self.goal, task=task, layers=self.pattern, finetuning=tuning),
            totals=totals,
            layers=layer_reports(plan.layers, modules, reordered),
            quality=Quality(),
            timings_s=Timings(),
            frontier=plan.frontier,
        )


def _opened(place: Path, task: Task, observer: Observer) -> nn.Module:
    """An output directory in the task's model; tensors that the model does not know are named in a message."""
    model = load(place, task.model(), strict=False)
    own = model.state_dict()
    unknown = [name for name in read_tensors(place) if name not in own]
    if unknown:
        observer.message(f"{len(unknown)} tensors of {place} are unknown to model(): {_listed(unknown)}.")
    return model


def _teacher(place: Path, report: Report, given: str | Path | None, task: Task, observer: Observer) -> nn.Module | None:
    if given is not None:
        return dense_model(task, read_checkpoint(given), observer)
    path = report.source.get("path")
    if path is not None and (place / path).is_file():
        found = read_checkpoint(place / path)
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


def _restarted(data: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterable[Any]:
    return data() if callable(data) else data


def _without_prefix(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without a wrapper's prefix (Lightning's `model.`, say), where that makes them the model's."""
    if all(name in tensors for name in own):
        return tensors
    first = next(iter(own), "")
    for name in tensors:
        if first and name.endswith("." + first):
            prefix = name[: -len(first)]
            cut = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if all(n in cut for n in own):
                return cut
    return tensors


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""One compression from a model to what will be written: the stages in order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.checkpoint.directory import assembled, config_of
from htcompress.checkpoint.inventory import inventory, inventory_of_model, names_of, tensor_names
from htcompress.checkpoint.names import listed
from htcompress.checkpoint.read import Checkpoint
from htcompress.data import (
    Data,
    Peeked,
    Reading,
    calibration_reading,
    direction_of,
    finite,
    to_device,
    training_reading,
)
from htcompress.errors import CheckpointError, TaskError
from htcompress.finetuning.distill import FineTuning, Progress, distill
from htcompress.isolation import on_the_cpu, seeded
from htcompress.nn.dense import DenseLayer
from htcompress.nn.latency import LATENCY_OF, latencies
from htcompress.nn.plain import without_packing
from htcompress.nn.recurrent import HTRecurrent, module_class
from htcompress.nn.replace import copied, stand_ins, with_stand_ins
from htcompress.nn.settings import RecurrentSettings
from htcompress.observer import Observer
from htcompress.planning import Goal, ModelPlan, UnitOrder, plan_model
from htcompress.planning.units import arrange_units, unit_orders
from htcompress.proof import Answer, Proof, answer, prove, without_bypassed
from htcompress.report import Latency, Quality, Report, Timings, words
from htcompress.report.build import Counted, layer_reports, request_of, totals_of
from htcompress.selection import assumed_settings, module_names, selected
from htcompress.statistics.collect import SlotStatistics, collect
from htcompress.task import output_of
from htcompress.values import Arguments, precision_of


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
    """

    model: nn.Module | None
    modules: dict[str, HTRecurrent]
    tensors: dict[str, Any]
    report: Report
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Tried:
    """A batch of the user's, as the model takes it, and what the dense model answers."""

    item: Any
    reading: Reading
    arguments: Arguments
    answer: Answer


@dataclass(frozen=True, eq=False)
class Run:
    """One compression: the stages in order, with their times."""

    goal: Goal
    pattern: str
    data: Data
    finetuning: FineTuning
    seed: int
    observer: Observer

    def with_tensors(self, checkpoint: Checkpoint, source: dict[str, Any]) -> Compressed:
        """Work from the weights alone."""
        left: dict[str, str] = {}
        every = inventory(checkpoint.tensors, source=str(checkpoint.path), on_left=left.__setitem__)
        names = {layer.name: names_of(layer, checkpoint.tensors) for layer in every}
        layers = [layer for layer in every if layer.name in selected(names, self.pattern)]
        left = {name: reason for name, reason in left.items() if fnmatchcase(name, self.pattern)}
        self._tell(left)
        plan, seconds = self._planned(layers, None)
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
        counted = Counted.of(layers, checkpoint.tensors, tensors)
        report = self._report(plan, modules, counted, source, None, left)
        report = replace(report, timings_s=Timings(decompose=seconds))
        return Compressed(None, modules, tensors, report, config_of(modules, tied=tied, assumed=assumed))

    def with_model(
        self,
        model: nn.Module,
        fresh: Callable[[], nn.Module],
        before: Mapping[str, Any],
        source: dict[str, Any],
        *,
        task: str | None,
    ) -> Compressed:
        """Prove, calibrate, decompose, fine-tune, read back, evaluate.

        Args:
            model: the dense model, private to this run, in evaluation mode.
            fresh: makes another instance of it, into which what would be written is read back.
            before: its state as it was stored.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        names = selected(module_names(model), self.pattern, source="The model")
        clock = _Clock()
        with clock("evaluate"):
            quality = self.measured(Quality(), "dense", model)
        calibration = None if self.data.calibration is None else Peeked(self.data.calibration)
        training = None if self.data.training is None or self.finetuning.steps == 0 else Peeked(self.data.training)
        with clock("statistics"), seeded(self.seed):
            self.observer.stage("trying stand-ins")
            tried = self._tried(model, calibration, training)
            proof = prove(model, names, *(() if tried is None else (tried.arguments, tried.answer)))
            # An error goal is about the weights: data would not change what is asked.
            weighed = calibration is not None and tried is not None and self.goal.error is None
            statistics = self._statistics(model, proof, calibration, tried) if weighed else None
            if statistics is not None:
                proof = without_bypassed(model, proof, statistics)
            self._tell(proof.left)
            if not proof.names:
                reasons = " ".join(words.left(proof.left))
                raise CheckpointError(f"None of the recurrent layers can be compressed. {reasons}")
            reading = None if training is None else self._training_reading(model, training, tried)
        layers = inventory_of_model(model, names=proof.names)
        orders, moved = None, {}
        dense = model
        if statistics is not None and self.goal.folds and tried is not None:  # which folds nothing
            if self.goal.units is UnitOrder.AUTO:
                with on_the_cpu():
                    orders = unit_orders(layers, statistics)
            elif self.goal.units is UnitOrder.READERS:
                with on_the_cpu():
                    arranged = arrange_units(model, statistics, tried.arguments)
                dense, statistics, moved = arranged.model, arranged.statistics, arranged.orders
                layers = inventory_of_model(dense, names=proof.names)
        plan, decomposing = self._planned(layers, statistics, orders)
        modules = {layer.name: layer.build().to(device) for layer in plan.layers}
        for name, owner in proof.tied.items():
            settings = RecurrentSettings.of(model.get_submodule(name))
            modules[name] = module_class(settings)(settings, list(modules[owner].slots().values()))
        compact = with_stand_ins(dense, modules).eval()
        stage, tuning = "decomposed", None
        if training is not None and reading is not None:
            with clock("evaluate"):
                quality = self.measured(quality, "decomposed", compact)
            stage, tuning = "finetuned", self.tuned(compact, dense, lambda: map(reading, training()))
        config = json.loads(json.dumps(config_of({n: modules[n] for n in proof.names}, tied=proof.tied, orders=moved)))
        state = snapshot(compact)
        result = self.read_back(config, state, fresh(), compact, None if tried is None else tried.arguments)
        with clock("evaluate"):
            quality = self.measured(quality, stage, result)
        result = result.cpu()
        own = {name: module for name, module in stand_ins(result).items() if name in proof.names}
        counted = Counted.of(layers, before, state)
        report = self._report(plan, own, counted, source, task, proof.left, tuple(moved), tried)
        timings = Timings(
            clock.seconds.get("statistics") if statistics is not None else None,
            decomposing,
            tuning,
            clock.seconds.get("evaluate") if self.data.evaluate is not None else None,
        )
        latency = self._latency(model, result, tried)
        report = replace(report, quality=quality, timings_s=timings, latency=latency)
        return Compressed(result, own, state, report, config)

    # ---- the stages ------------------------------------------------------------------------------------

    def _tried(self, model: nn.Module, calibration: Peeked | None, training: Peeked | None) -> Tried | None:
        """The first batch of the calibration data, or else of the training data; None where there is no data."""
        if calibration is not None:
            if calibration.empty:
                raise TaskError("calibration() yields nothing; it must yield at least one batch of the model's input.")
            reading, found = calibration_reading(model, calibration.first)
            return Tried(calibration.first, reading, reading(calibration.first), found)
        if training is None or training.empty:
            return None
        pairs = training_reading(model, training.first, loss=self.data.loss)
        given, _ = pairs(training.first)
        return Tried(training.first, lambda item: pairs(item)[0], given, answer(model, given))

    def _training_reading(self, model: nn.Module, training: Peeked, tried: Tried | None) -> Any:
        if training.empty:
            raise TaskError(
                "Fine-tuning needs at least two batches, one of them held out; training() yields 0. Yield smaller "
                "batches, or convert with --no-finetune."
            )
        like = None if tried is None else (tried.item, tried.reading)
        return training_reading(model, training.first, loss=self.data.loss, like=like)

    def _statistics(
        self, model: nn.Module, proof: Proof, calibration: Peeked | None, tried: Tried | None
    ) -> dict[str, dict[str, SlotStatistics]] | None:
        """What was seen of the layers."""
        if calibration is None or tried is None or not proof.names:
            return None
        self.observer.stage("calibrating")
        last: list[Arguments] = []

        def batches() -> Any:
            for item in calibration():
                last[:] = [tried.reading(item)]
                yield last[0]

        try:
            return collect(
                model,
                batches(),
                names=proof.names,
                tied=proof.tied,
                seed=self.seed,
                on_batch=self.observer.advance,
            )
        except TaskError:
            raise
        except Exception:
            # A batch that the dense model cannot take either is the task's fault, and told in the model's words.
            if last:
                with torch.no_grad():
                    output_of(copied(model, sharing=model.parameters()), last[0], source="calibration()")
            raise

    def _planned(
        self,
        layers: list[DenseLayer],
        statistics: Mapping[str, Mapping[str, SlotStatistics]] | None,
        orders: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> tuple[ModelPlan, float]:
        self.observer.stage("decomposing")
        began = time.perf_counter()
        with torch.no_grad(), on_the_cpu():
            plan = plan_model(layers, self.goal, statistics, orders)
        return plan, round(time.perf_counter() - began, 3)

    def measured(self, quality: Quality, stage: str, model: nn.Module) -> Quality:
        """The quality with one more stage, where there is a metric; the user's code is given a copy of the model."""
        if self.data.evaluate is None:
            return quality
        self.observer.stage(f"evaluating the {stage} model")
        trial = copied(model).eval()
        with seeded(self.seed), without_packing(trial):
            metrics = self.data.evaluate(trial)
        broken = finite(metrics)
        if broken and stage == "dense":
            raise TaskError(f"evaluate(model) gave {listed(broken)} for the dense model; expected finite numbers.")
        if broken:
            self.observer.message(f"The {stage} model has {listed(broken)}: it counts as not measured.")
            return quality
        higher = direction_of(next(iter(metrics)), self.data.higher_is_better)
        return quality.with_stage(stage, metrics, higher_is_better=higher)

    def tuned(
        self,
        compact: nn.Module,
        teacher: nn.Module | None,
        batches: Any,
        places: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Fine-tune in place; the seconds it took."""
        began = time.perf_counter()
        self.observer.stage("fine-tuning", self.finetuning.steps)

        def show(progress: Progress) -> None:
            self.observer.advance(progress.step, f"loss {progress.loss:.3g}, best {progress.best:.3g}")

        distill(
            compact,
            None if teacher is None else copied(teacher, sharing=teacher.parameters()),
            batches,
            loss=self.data.loss,
            options=self.finetuning,
            places=places,
            on_progress=show,
        )
        return round(time.perf_counter() - began, 3)

    def read_back(
        self,
        config: Mapping[str, Any],
        state: Mapping[str, Any],
        fresh: nn.Module,
        compact: nn.Module,
        arguments: Arguments | None,
    ) -> nn.Module:
        """What would be written, in a fresh model, which must answer as the one that was made.

        Raises `TaskError` where it does not.
        """
        device = next((p.device for p in compact.parameters()), torch.device("cpu"))
        again = assembled(config, state, fresh, Path("The output"), strict=False).to(device).eval()
        if arguments is not None:
            lost = answer(again, arguments).difference(answer(compact, arguments))
            if not lost <= precision_of(compact):
                raise TaskError(
                    f"Read back into a fresh model, what would be written answers otherwise (by {lost:.2g}): something "
                    f"that is no parameter and no buffer decides what the model answers. Register it as a buffer, or "
                    f"let model() make it alike each time."
                )
        return again

    def _latency(self, dense: nn.Module, compact: nn.Module, tried: Tried | None) -> Latency | None:
        """How long a call takes, before and after; None without anything to call the models with."""
        if tried is None:
            return None
        self.observer.stage("measuring latency")
        models = {
            "dense": copied(dense, sharing=dense.parameters()).cpu().eval(),
            "compact": copied(compact, sharing=compact.parameters()).eval(),
        }
        found = latencies(models, to_device(tried.arguments, torch.device("cpu")))
        return Latency(found["dense"], found["compact"], f"one call of the model, {LATENCY_OF}")

    def _tell(self, left: Mapping[str, str]) -> None:
        for sentence in words.left(left):
            self.observer.message(sentence)

    def _report(
        self,
        plan: ModelPlan,
        modules: Mapping[str, HTRecurrent],
        counted: Counted,
        source: dict[str, Any],
        task: str | None,
        left: Mapping[str, str],
        moved: Sequence[str] = (),
        tried: Tried | None = None,
    ) -> Report:
        totals = totals_of(modules, counted)
        if self.goal.budget is not None and totals.parameters_after > self.goal.budget:
            raise RuntimeError(f"{totals.parameters_after} numbers exceed the budget of {self.goal.budget}.")
        tuning = None if self.data.training is None else self.finetuning
        return Report(
            version=version("htcompress"),
            source=source,
            seed=self.seed,
            request=request_of(self.goal, task=task, layers=self.pattern, finetuning=tuning),
            totals=totals,
            layers=layer_reports(plan.layers, modules, moved),
            quality=Quality(),
            timings_s=Timings(),
            frontier=plan.frontier,
            left=dict(left),
        )


class _Clock:
    """Seconds spent, by the names of stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._began = "", 0.0

    def __call__(self, name: str) -> _Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._began
        self.seconds[self._name] = round(self.seconds.get(self._name, 0.0) + spent, 3)


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

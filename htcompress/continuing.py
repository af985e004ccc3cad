"""What goes on from an output directory: `finetune` and `evaluate`, by the stages of `htcompress.compression`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from htcompress.compression import Compressed
from htcompress.data import Data, Peeked
from htcompress.directory.read import read_config, read_state
from htcompress.errors import TaskError
from htcompress.finetuning.checkpoints import Checkpoints, Saved
from htcompress.finetuning.together import Alone, Together
from htcompress.isolation import restored, seeded
from htcompress.model.plain import without_packing
from htcompress.model.replace import stand_ins
from htcompress.observer import Observer
from htcompress.opening import dense_model, device_named, opened, places_of, teacher_of
from htcompress.report import Quality, read_report
from htcompress.request import FineTuning
from htcompress.sources.read import read_checkpoint
from htcompress.stages import Clock, measured, read_back, snapshot, tell_if_in_vain, training_batches, tried, tuned
from htcompress.task import Task, load_task

__all__ = ["evaluate", "finetune"]


def finetune(
    directory: str | Path,
    *,
    task: str | Path | Task,
    teacher: str | Path | None = None,
    options: FineTuning | None = None,
    device: str = "cpu",
    observer: Observer | None = None,
    together: Together | None = None,
    checkpoints: Checkpoints | None = None,
) -> Compressed:
    """Continue fine-tuning of an output directory; the result is not written (see `save`).

    The teacher is the dense checkpoint that the directory was made from, found by the path kept in its
    report. Without it the task's own loss is all there is to train on.

    Args:
        together: the processes that share the work, from `joined`; each of them calls this alike, and is given the
            same weights. Only the first measures, so only its report is whole.
        checkpoints: where the state of the run is kept, and whether to go on from what is there. Remove them
            (`Checkpoints.remove`) when the result is written.

    Raises:
        TaskError: the task lacks what fine-tuning needs.
        CheckpointError: the directory, the teacher or the checkpoint of the run cannot be read.
        RequestError: there is such a checkpoint, and the run is not to go on from it.
    """
    observer, options, place = observer or Observer(), options or FineTuning(), Path(directory)
    together = together or Alone()
    seed = options.seed

    def looked(quality: Quality, stage: str, model: nn.Module) -> Quality:
        return measured(quality, stage, model, data, seed, observer) if together.index == 0 else quality

    with restored():
        where = device_named(together.device(device))
        if checkpoints is not None:
            _tell_of_last(checkpoints, together, observer)
        config = read_config(place)
        report = read_report(place)
        loaded = load_task(task)
        data = Data.of_task(loaded).on(where)
        if data.training is None:
            loaded.require("training", purpose="fine-tuning")
            raise TaskError(f"The task {loaded.source} has nothing to fine-tune on.")
        observer.stage("reading the directory")
        model = opened(place, loaded, observer).to(where)
        dense = teacher_of(place, report, teacher, loaded, observer)
        if dense is not None:
            dense = dense.to(where)
        quality = report.quality
        if data.evaluate is None and quality.final is not None:
            observer.message(f"{loaded.source} has no evaluate(): the fine-tuned model is not measured.")
            quality = replace(quality, decomposed=None, finetuned=None)
        elif quality.final is None:
            quality = looked(quality, "decomposed", model)
        with seeded(seed):
            training = Peeked(data.training)
            if dense is None:
                data = replace(data, unlabelled=None)  # nobody says what to answer
            batches = training_batches(model, data, training)
            batch = tried(model, data, None, training)
        arguments = None if batch is None else batch.arguments
        clock = Clock()
        with clock("finetune"):
            history = tuned(model, dense, batches, data, options, observer, places_of(config), together, checkpoints)
            tell_if_in_vain([history], observer)
        # Tensors that the model does not know stay in the directory.
        state = read_state(place) | snapshot(model)
        result = read_back(config, state, loaded.model().to(where), model, arguments)
        quality = looked(quality, "finetuned", result)
        if dense is not None and quality.dense is None:
            quality = looked(quality, "dense", dense)
        spent = (report.timings_s.finetune or 0.0) + clock.seconds["finetune"]
        done = replace(report, quality=quality, timings_s=replace(report.timings_s, finetune=round(spent, 3)))
        path = report.source.get("path")
        if path is not None:
            done = replace(done, source={**done.source, "path": str(place / path)})
        result = result.cpu()
        modules = {name: module for name, module in stand_ins(result).items() if name in config["layers"]}
        kept = {name: value for name, value in config.items() if name != "extra"}
        return Compressed(result, modules, state, done, kept)


def _tell_of_last(checkpoints: Checkpoints, together: Together, observer: Observer) -> None:
    """Say from where a run goes on, before there is anything to wait for."""
    content = together.of_first(checkpoints.last)
    if content is not None:
        standing = Saved.of_bytes(content, checkpoints.file).facts["standing"]
        observer.message(f"Going on from step {standing['step']} of {standing['end']}, as kept in {checkpoints.file}.")
    elif checkpoints.resume:
        observer.message(f"There is no checkpoint in {checkpoints.folder}: fine-tuning begins at its start.")


def evaluate(
    source: str | Path,
    *,
    task: str | Path | Task,
    weights: str | None = None,
    names: Mapping[str, str] | None = None,
    device: str = "cpu",
    observer: Observer | None = None,
) -> dict[str, float]:
    """The task's metrics of an output directory or of a dense checkpoint; the first is the headline.

    Args:
        weights: the state_dict to take of a checkpoint that holds several.
        names: torch's names for tensors that a checkpoint calls otherwise.
    """
    observer = observer or Observer()
    with restored():
        where = device_named(device)
        loaded = load_task(task)
        loaded.require("evaluate", purpose="evaluation")
        place = Path(source)
        if place.is_dir():
            model = opened(place, loaded, observer)
        else:
            model = dense_model(loaded, read_checkpoint(place, weights=weights, names=names), observer)
        observer.stage("evaluating")
        model = model.to(where).eval()
        with seeded(0), without_packing(model):
            return loaded.evaluate(model)

"""Models of a task with weights in them: a checkpoint's, an output directory's, a teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.directory.read import load, read_state
from htcompress.errors import RequestError, TaskError
from htcompress.model.loading import load_checkpoint
from htcompress.model.names import listed, own_names, renamed
from htcompress.model.reparametrised import with_plain_weights
from htcompress.nn.settings import RecurrentSettings
from htcompress.observer import Observer
from htcompress.report import Report
from htcompress.request import Request
from htcompress.sources.read import Checkpoint, read_checkpoint
from htcompress.task import Task


def dense_model(task: Task, checkpoint: Checkpoint, observer: Observer) -> nn.Module:
    """The task's model with the checkpoint's tensors in it; see `load_checkpoint`, `with_plain_weights`."""
    model = load_checkpoint(task.model(), checkpoint, observer, source=task.source)
    for sentence in with_plain_weights(model):
        observer.message(sentence)
    return model


def opened(place: Path, task: Task, observer: Observer) -> nn.Module:
    """An output directory in the task's model; tensors that the model does not know are named in a message."""
    model = load(place, task.model(), strict=False)
    own = own_names(model)
    unknown = [name for name in renamed(read_state(place), own) if name not in own]
    if unknown:
        observer.message(f"{len(unknown)} tensors of {place} are unknown to model(): {listed(unknown)}.")
    return model


def teacher_of(
    place: Path, report: Report, given: str | Path | None, task: Task, observer: Observer
) -> nn.Module | None:
    """The dense model that a directory was made from; None, with a message, where it is not found.

    Args:
        given: its checkpoint; None: the one whose path the report keeps, if it is still the same file.

    Raises `TaskError` where it is not found and the task has nothing else to train on.
    """
    weights, names = report.source.get("weights"), Request.of_report(report.request).names
    if given is not None:
        return dense_model(task, read_checkpoint(given, weights=weights, names=names), observer)
    path = report.source.get("path")
    if path is not None and (place / path).exists():
        found = read_checkpoint(place / path, weights=weights, names=names)
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


def places_of(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where a layer's outputs stand that are put out in another order than the dense model's, by layer."""
    found = {}
    for name, layer in config["layers"].items():
        settings = RecurrentSettings.from_config(layer["settings"])
        if "units" not in layer or settings.proj_size:
            continue
        last = settings.direction_names[-settings.num_directions :]
        parts = []
        for index, direction in enumerate(last):
            order = torch.tensor(layer["units"].get(direction, list(range(settings.hidden_size))))
            parts.append(torch.argsort(order) + index * settings.hidden_size)
        found[name] = torch.cat(parts)
    return found


def device_named(name: str) -> torch.device:
    """A device. Raises `RequestError` where it is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"The device {name!r} is not there: {str(error).splitlines()[0]}. Try cpu.") from error
    return device

"""What a study compresses: a checkpoint in the model of a task or of a class, or a model that runs from its file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from htcompress.construction import Constructed
from htcompress.conversion import runs_alone
from htcompress.data import Peeked, calibration_reading, training_reading
from htcompress.directory.read import load
from htcompress.errors import RequestError
from htcompress.graphs.calibration import Calibration
from htcompress.graphs.formats import graph_in, read_graph, refuse_names
from htcompress.graphs.measuring import call_times, feeds_for
from htcompress.model.latency import LATENCY_OF, latencies
from htcompress.observer import Observer
from htcompress.opening import dense_model
from htcompress.plain_task import task_for_checkpoint
from htcompress.request import Request
from htcompress.sources.read import identified, read_checkpoint
from htcompress.task import Task, load_task
from htcompress.values import Arguments


@dataclass(frozen=True, eq=False)
class Source(ABC):
    """A dense model, as far as a study looks at it itself.

    Attributes:
        file: its name.
        sha256: of the file.
    """

    file: str
    sha256: str | None

    @abstractmethod
    def latencies(self, points: Path, names: Sequence[str]) -> tuple[dict[str, float], str | None]:
        """Milliseconds of one call, of the dense model (`dense`) and of output directories by name, and of what.

        Nothing, and None, where there is nothing to call them with.
        """


@dataclass(frozen=True, eq=False)
class Weights(Source):
    """A checkpoint of weights, in a model."""

    model: nn.Module
    task: Task

    def latencies(self, points: Path, names: Sequence[str]) -> tuple[dict[str, float], str | None]:
        batch = _batch(self.model, self.task)
        if batch is None:
            return {}, None
        models = {"dense": self.model.cpu().eval()}
        for name in names:
            models[name] = load(points / name, self.task.model(), strict=False).eval()
        return latencies(models, batch), f"one call of the model, {LATENCY_OF}"


@dataclass(frozen=True, eq=False)
class RunsAlone(Source):
    """A model of ONNX or Keras, and the data that it is run on."""

    path: Path
    data: Calibration
    task: str | None

    def latencies(self, points: Path, names: Sequence[str]) -> tuple[dict[str, float], str | None]:
        dense = read_graph(self.path)
        if (self.data.file is None and self.task is None) or not dense.keeps_cores:
            return {}, None
        graphs = {"dense": dense}
        for name in names:
            written = graph_in(points / name)
            if written is not None:
                graphs[name] = read_graph(written)
        task = None if self.task is None else load_task(self.task, needs=())
        feeds = feeds_for(dense.session(), self.data, task)
        return call_times(graphs, feeds), f"one call in {dense.runtime}, {LATENCY_OF}"


def opened(checkpoint: str | Path, request: Request, data: Calibration, observer: Observer) -> Source:
    """The dense model of a request.

    Raises:
        RequestError: nothing says what the model is, or what is asked for does not go together.
        HTCompressError: as `htcompress.convert`, of the files.
    """
    path = Path(checkpoint)
    observer.stage("reading the checkpoint")
    if runs_alone(path, request, data) is not None:
        refuse_names(path, request.names)
        data.check()
        _, digest, _ = identified(path)
        return RunsAlone(path.name, digest, path, data, request.task)
    if request.task is not None:
        task = load_task(request.task)
    elif request.model is not None:
        task = task_for_checkpoint(request.model, path, request, observer)
    else:
        raise RequestError(
            f"A study of {path} needs --task TASK, or --model package.module:Class and --calibration X.npz: the model, "
            f"its data and its metric."
        )
    read = read_checkpoint(path, weights=request.weights, names=request.names)
    model = dense_model(task, read, observer).to(torch.device(request.device))
    return Weights(read.path.name, read.sha256, model, task)


def anywhere(request: Request, data: Calibration) -> tuple[Request, Calibration]:
    """The same with paths that hold wherever a worker stands; a module is found by its name."""
    task = None if request.task is None else _whole(request.task)
    found = replace(request, task=task)
    if request.model is not None:
        source, _, name = request.model.name.rpartition(":")
        calibration = request.model.calibration
        made: Constructed = replace(
            request.model,
            name=f"{_whole(source)}:{name}" if source else request.model.name,
            calibration=None if calibration is None else str(Path(calibration).resolve()),
        )
        found = replace(found, model=made)
    return found, data if data.file is None else replace(data, file=data.file.resolve())


def _whole(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_file() else name


def _batch(model: nn.Module, task: Task) -> Arguments | None:
    """Something to call the model with."""
    if task.has("calibration"):
        first = Peeked(task.calibration)
        return None if first.empty else calibration_reading(model, first.first)[0](first.first)
    if not task.can_train:
        return None
    first = Peeked(task.training)
    return None if first.empty else training_reading(model, first.first, loss=task.loss)(first.first)[0]

"""`convert`: from a file of any kind that can be read, by the stages that suit it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from htcompress import compression
from htcompress.compression import Compressed
from htcompress.construction import Constructed
from htcompress.errors import RequestError
from htcompress.graphs.calibration import Calibration
from htcompress.graphs.formats import GRAPHS, container_of, graph_in, refuse_names
from htcompress.isolation import restored
from htcompress.observer import Observer
from htcompress.report import read_report
from htcompress.request import FineTuning, Goal, Request
from htcompress.sources.read import READERS
from htcompress.sources.recognise import Container
from htcompress.task import Task, load_task

__all__ = ["convert", "converted"]


def convert(
    checkpoint: str | Path,
    *,
    goal: Goal,
    task: str | Path | None = None,
    calibration: str | Path | None = None,
    targets: str | None = None,
    metric: str | None = None,
    model: str | None = None,
    model_arguments: Mapping[str, Any] | None = None,
    layers: str = "*",
    weights: str | None = None,
    names: Mapping[str, str] | None = None,
    finetuning: FineTuning | None = None,
    seed: int = 0,
    device: str = "cpu",
    observer: Observer | None = None,
) -> Compressed:
    """Compress the recurrent layers of a checkpoint file; what `htcompress convert` does.

    Args:
        checkpoint: a state_dict in `.pt`, `.pth`, `.ckpt`, `.safetensors` or `.npz`, an ONNX model, or a file of Keras.
        goal: the budget, the error or the ratio; the scope and the layout.
        task: a task file or module; without one the weights alone are worked from. Beside a model of ONNX or Keras it
            needs no `model()`.
        calibration: for a model of ONNX or Keras, or beside `model`, an `.npz` file with an array for each input, the
            first axis the samples.
        targets: the name of an array of that file to measure against.
        metric: what is measured: `accuracy`, `mse` or `mae`.
        model: in place of a task, the class of the model, `package.module:Class`; it is imported and run.
        model_arguments: what it is constructed with, by name; values of JSON.
        weights: the state_dict to take of a file that holds several, such as `state_dict_ema`.
        names: torch's names for tensors that the file calls otherwise: `{"rnn.weight_ih_l0": "w_ih"}`.
        finetuning: how to fine-tune; None: not at all.
        device: where calibration, fine-tuning and evaluation run.

    Raises:
        HTCompressError: as `compress`, and `CheckpointError`, `TaskError` for the files.
    """
    asked = None if task is None else str(task)
    data = (None if calibration is None else str(calibration), targets, metric)
    arguments = None if model_arguments is None else json.dumps(dict(model_arguments))
    constructed = Constructed.of_options(model, arguments, *data)
    request = Request(goal, layers, finetuning, seed, asked, weights, device, names, constructed)
    given = Calibration(None if calibration is None else Path(calibration), targets, metric)
    return converted(checkpoint, request, given, observer=observer)


def is_graph(source: str | Path, task: str | Path | None = None) -> bool:
    """Whether a file is a model of ONNX or Keras, or an output directory that holds one.

    Args:
        task: what is given beside it; with a `model()` in torch it makes mere weights of a file of Keras.
    """
    container = container_of(source)
    return graph_in(source) is not None or (container is not None and not _for_torch(container, task))


def _for_torch(container: Container, task: str | Path | None) -> bool:
    return container in READERS and task is not None and load_task(task, needs=()).has("model")


def evaluated(source: str | Path, given: Calibration, task: str | Path | None = None) -> dict[str, float]:
    """The metrics of such a model, or of an output directory of one; see `htcompress.graphs.measuring.evaluate`."""
    from htcompress.graphs import measuring

    with restored():
        return measuring.evaluate(Path(source), given, None if task is None else load_task(task, needs=()))


def task_of(
    source: str | Path,
    task: str | Path | None,
    asked: Constructed | None,
    *,
    purpose: str,
    teacher: str | Path | None = None,
    observer: Observer | None = None,
) -> str | Path | Task:
    """The task that goes on with an output directory, or evaluates a checkpoint.

    Args:
        source: the directory, or the checkpoint.
        task: a task file or module.
        asked: a class and its data in its place.
        purpose: what needs it, for messages.
        teacher: the dense checkpoint of a directory; None: the one whose path its report keeps.

    Raises `RequestError` where neither or both are given; it says how the directory was made.
    """
    from htcompress.plain_task import made_task, task_for_directory

    if task is not None and asked is not None:
        raise RequestError("--task and --model both say what the model is; leave out one of them.")
    if task is not None:
        return task
    if asked is not None and asked.calibration is None:
        raise RequestError("--model tells nothing of the data: give --calibration X.npz, an array for each input.")
    place, observer = Path(source), observer or Observer()
    ours = place.is_dir() and (place / "report.json").is_file()
    if asked is not None and not ours:
        return made_task(asked, None, observer)
    if asked is not None:
        return task_for_directory(asked, place, observer, teacher=teacher)
    made = ""
    if ours:
        known = Request.of_report(read_report(place).request)
        told = known.model.command() if known.model is not None else known.task and f"--task {known.task}"
        made = f" {place} was made with {told}." if told else ""
    raise RequestError(
        f"{purpose} needs --task TASK, or --model package.module:Class and --calibration X.npz: the model, its data "
        f"and its metric.{made}"
    )


def runs_alone(checkpoint: str | Path, request: Request, given: Calibration) -> Container | None:
    """The format of a model that is run from its own file; None where it is weights, of whatever model.

    Raises `RequestError` where what is asked for does not go together.
    """
    if request.task is not None and request.model is not None:
        raise RequestError("--task and --model both say what the model is; leave out one of them.")
    container = container_of(checkpoint)
    if container is not None and container not in READERS and request.model is not None:
        raise RequestError(f"{checkpoint} runs by itself: give --calibration X.npz in place of --model.")
    if request.model is not None:
        return None
    if container is not None and _for_torch(container, request.task):
        container = None
    if container is None and request.task is not None and given.file is not None:
        raise RequestError(f"{checkpoint} is calibrated by --calibration X.npz or by --task; leave out one of them.")
    if container is None and given.file is not None:
        raise RequestError(
            f"--calibration is for models that run from their own file (ONNX, Keras); {checkpoint} is none. Name its "
            f"class with --model package.module:Class, or give a task with --task, whose calibration() yields the "
            f"inputs."
        )
    return container


def converted(
    checkpoint: str | Path, request: Request, given: Calibration | None = None, *, observer: Observer | None = None
) -> Compressed:
    """What a request makes of a file; see `convert`."""
    given, observer = given or Calibration(), observer or Observer()
    container = runs_alone(checkpoint, request, given)
    if container is not None:
        from htcompress.graphs import converting

        refuse_names(checkpoint, request.names)
        return converting.converted(Path(checkpoint), GRAPHS[container], request, given, observer)
    if request.model is None:
        return compression.converted(checkpoint, request, observer=observer)
    from htcompress.plain_task import task_for_checkpoint

    with restored():
        task = task_for_checkpoint(request.model, checkpoint, request, observer)
        return compression.converted(checkpoint, request, task=task, observer=observer)

"""`convert`: from a file of any kind that can be read, by the stages that suit it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from htcompress import compression
from htcompress.compression import Compressed
from htcompress.errors import RequestError
from htcompress.graphs.calibration import Calibration
from htcompress.graphs.formats import GRAPHS, container_of, graph_in, refuse_names
from htcompress.observer import Observer
from htcompress.request import FineTuning, Goal, Request
from htcompress.sources.read import READERS

__all__ = ["convert", "converted"]


def convert(
    checkpoint: str | Path,
    *,
    goal: Goal,
    task: str | Path | None = None,
    calibration: str | Path | None = None,
    targets: str | None = None,
    metric: str | None = None,
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
        task: a task file or module; without one the weights alone are worked from.
        calibration: for a model of ONNX or Keras, an `.npz` file with an array for each input, the first axis the
            samples.
        targets: the name of an array of that file to measure against.
        metric: what is measured: `accuracy`, `mse` or `mae`.
        weights: the state_dict to take of a file that holds several, such as `state_dict_ema`.
        names: torch's names for tensors that the file calls otherwise: `{"rnn.weight_ih_l0": "w_ih"}`.
        finetuning: how to fine-tune; None: not at all.
        device: where calibration, fine-tuning and evaluation run.

    Raises:
        HTCompressError: as `compress`, and `CheckpointError`, `TaskError` for the files.
    """
    asked = None if task is None else str(task)
    request = Request(goal, layers, finetuning, seed, asked, weights, device, names)
    given = Calibration(None if calibration is None else Path(calibration), targets, metric)
    return converted(checkpoint, request, given, observer=observer)


def is_graph(source: str | Path) -> bool:
    """Whether a file is a model of ONNX or Keras, or an output directory that holds one."""
    return container_of(source) is not None or graph_in(source) is not None


def evaluated(source: str | Path, given: Calibration) -> dict[str, float]:
    """The metrics of such a model, or of an output directory of one; see `htcompress.graphs.measuring.evaluate`."""
    from htcompress.graphs import measuring

    return measuring.evaluate(Path(source), given)


def converted(
    checkpoint: str | Path, request: Request, given: Calibration | None = None, *, observer: Observer | None = None
) -> Compressed:
    """What a request makes of a file; see `convert`."""
    given = given or Calibration()
    container = container_of(checkpoint)
    if container is not None and request.task is not None and container not in READERS:
        raise RequestError(f"{checkpoint} runs by itself: give --calibration X.npz in place of --task.")
    if container is not None and (request.task is None or given.file is not None):
        from htcompress.graphs import converting

        refuse_names(checkpoint, request.names)
        if request.task is not None:
            raise RequestError(
                f"{checkpoint} is calibrated by --calibration X.npz or by --task; leave out one of them."
            )
        return converting.converted(Path(checkpoint), GRAPHS[container], request, given, observer)
    if given.file is not None:
        raise RequestError(
            f"--calibration is for models that run from their own file (ONNX, Keras); {checkpoint} is none. Give a "
            f"task with --task, whose calibration() yields the inputs."
        )
    return compression.converted(checkpoint, request, observer=observer)

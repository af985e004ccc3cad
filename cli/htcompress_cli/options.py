"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from htcompress.errors import RequestError

if TYPE_CHECKING:
    from htcompress.finetuning.checkpoints import Checkpoints
    from htcompress.request import FineTuning

Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CKPT", help="A trained model: .pt, .pth, .ckpt, .safetensors, .npz, .onnx, .keras, .h5."),
]
TaskOption = Annotated[
    str | None, typer.Option("--task", metavar="TASK", help="The task: a file (task.py) or a module (package.module).")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODULE:CLASS", help="In place of a task: the model's class; it is run as such."),
]
ModelArguments = Annotated[
    str | None, typer.Option(metavar="JSON", help="What it is constructed with: '{\"hidden\": 256}'.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="X.npz",
        help="For --model, and for ONNX and Keras: an array for each input, first axis the samples.",
    ),
]
Targets = Annotated[
    str | None, typer.Option(metavar="NAME", help="An array of that file to measure the first output against.")
]
Metric = Annotated[
    str | None, typer.Option(metavar="NAME", help="What is measured: accuracy, mse, mae.", show_default="accuracy")
]
ScopeOption = Annotated[
    str, typer.Option(metavar="SCOPE", help="What is factored together: auto, integrated, separate, input.")
]
Layers = Annotated[str, typer.Option(metavar="GLOB", help="Which recurrent layers; the others stay dense.")]
Weights = Annotated[
    str | None, typer.Option(metavar="KEY", help="Which state_dict of a file that holds several: state_dict_ema.")
]
Names = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=ARRAY,...", help="Torch's names for arrays that are called otherwise; ARRAY.T: the transpose."
    ),
]
UnitOrderOption = Annotated[
    str, typer.Option("--unit-order", metavar="HOW", help="How hidden units are ordered to fold: auto, readers, keep.")
]
Finetune = Annotated[bool, typer.Option("--finetune/--no-finetune", help="Distil from the dense model.")]
Steps = Annotated[
    str | None, typer.Option(metavar="N", help="Steps of fine-tuning.", show_default="400, and more while they help")
]
Epochs = Annotated[str | None, typer.Option(metavar="N", help="Instead, passes over the training data.")]
TimeLimit = Annotated[
    str | None, typer.Option(metavar="SECONDS", help="Of fine-tuning; its schedule shortens with it.")
]
Accumulate = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Batches of a step, as if they were one; each process takes so many.", show_default="1"
    ),
]
MixedPrecision = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="bf16 or no.", show_default="no, or as Accelerate is configured"),
]
CheckpointEvery = Annotated[
    str | None, typer.Option(metavar="STEPS", help="Keep the state of the run every so many steps.")
]
CheckpointFolder = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="FOLDER", help="Where it is kept.", show_default="DIR-checkpoint"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of everything drawn at random.")]
StudyOutput = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="Where it and its points are kept.",
        show_default="<name>-<command>",
    ),
]
Jobs = Annotated[int | None, typer.Option(metavar="N", help="Processes at a time.", show_default="cores")]
EngineOption = Annotated[str, typer.Option("--engine", metavar="NAME", help="Where points run: local, dask.")]
Scheduler = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Of a Dask cluster: tcp://host:8786.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where the model runs: cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def finetuning_of(
    steps: str | None,
    epochs: str | None,
    time_limit: str | None,
    seed: int,
    accumulate: str | None = None,
    mixed_precision: str | None = None,
) -> FineTuning:
    """The settings of fine-tuning that options ask for. Raises `RequestError` where they make no sense."""
    from htcompress.numbers import real, whole

    count = None if steps is None else whole(steps, "--steps", "400 or 1k")
    if count is not None and count < 0:
        raise RequestError(f"--steps is a number of steps, at least 0; found {steps}.")
    passes = None if epochs is None else real(epochs, "--epochs", "3")
    if passes is not None and passes <= 0:
        raise RequestError(f"--epochs is a number of passes over the training data, above 0; found {epochs}.")
    if passes is not None and count is not None:
        raise RequestError("--steps and --epochs both say how long to fine-tune; leave out one of them.")
    seconds = None if time_limit is None else real(time_limit, "--time-limit", "60")
    if seconds is not None and seconds <= 0:
        raise RequestError(f"--time-limit is a number of seconds, above 0; found {time_limit}.")
    joined = 1 if accumulate is None else whole(accumulate, "--accumulate", "4")
    if joined < 1:
        raise RequestError(f"--accumulate is a number of batches, at least 1; found {accumulate}.")
    from htcompress.request import FineTuning

    kind = "no" if mixed_precision is None else mixed_precision
    return FineTuning(count, passes, seconds, seed=seed, accumulate=joined, mixed_precision=kind)


def checkpoints_of(directory: Path, every: str | None, folder: Path | None, resume: bool) -> Checkpoints | None:
    """The checkpoints that options ask for; None where none are. Raises `RequestError` where they make no sense."""
    from htcompress.numbers import whole

    steps = None if every is None else whole(every, "--checkpoint-every", "100")
    if steps is not None and steps < 1:
        raise RequestError(f"--checkpoint-every is a number of steps, at least 1; found {every}.")
    if steps is None and not resume:
        if folder is not None:
            raise RequestError(f"--checkpoint {folder} says where; give --checkpoint-every STEPS or --resume, too.")
        return None
    from htcompress.finetuning.checkpoints import Checkpoints

    beside = directory.resolve()
    return Checkpoints(folder or directory.parent / f"{beside.name}-checkpoint", steps, resume)

"""inspect, convert, finetune, evaluate: one checkpoint, one output directory."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from htcompress_cli.consoles import open_screen, result_console
from htcompress_cli.options import (
    Accumulate,
    CalibrationOption,
    Checkpoint,
    CheckpointEvery,
    CheckpointFolder,
    Debug,
    Device,
    Epochs,
    Finetune,
    Json,
    Layers,
    Metric,
    MixedPrecision,
    ModelArguments,
    ModelOption,
    Names,
    Quiet,
    Resume,
    Seed,
    Steps,
    Targets,
    TaskOption,
    TimeLimit,
    UnitOrderOption,
    Weights,
    checkpoints_of,
    finetuning_of,
)

if TYPE_CHECKING:
    from htcompress.compression import Compressed


def inspect(
    checkpoint: Checkpoint,
    layers: Annotated[str, typer.Option(metavar="GLOB", help="Which recurrent layers.")] = "*",
    weights: Weights = None,
    names: Names = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recurrent layers found, their sizes and spectra, and what a few budgets would give."""
    from htcompress.inspection import inspect_checkpoint, inspection_to_terminal
    from htcompress.sources.naming import names_of

    found = inspect_checkpoint(checkpoint, layers=layers, weights=weights, names=names_of(names))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        result_console().print(inspection_to_terminal(found))


def init(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The task file.")] = Path("task.py"),
    weights: Weights = None,
    names: Names = None,
    debug: Debug = False,
) -> None:
    """Write a task file to begin with: the layers and tensors of a checkpoint, and what is to be filled in."""
    from htcompress.sources.naming import names_of
    from htcompress.starting import write_task

    typer.echo(f"written to {write_task(checkpoint, output, weights=weights, names=names_of(names))}")


def convert(
    checkpoint: Checkpoint,
    budget: Annotated[
        str | None, typer.Option(metavar="N", help="Numbers that the RNN may store (5000, 5k, 1.5m), or bytes (20kB).")
    ] = None,
    error: Annotated[
        str | None, typer.Option(metavar="E", help="Instead: relative error that each weight matrix keeps to: 0.1.")
    ] = None,
    ratio: Annotated[str | None, typer.Option(metavar="R", help="Instead: how many times smaller: 100.")] = None,
    task: TaskOption = None,
    model: ModelOption = None,
    model_arguments: ModelArguments = None,
    calibration: CalibrationOption = None,
    targets: Targets = None,
    metric: Metric = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="The output directory.", show_default="<name>-ht"),
    ] = None,
    scope: Annotated[
        str, typer.Option(metavar="SCOPE", help="What is put into HT form together: auto, integrated, separate, input.")
    ] = "auto",
    layout: Annotated[
        str, typer.Option(metavar="LAYOUT", help="How matrices are folded: auto, split, paired, svd.")
    ] = "auto",
    form: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="ht; for comparison tt, tr, bt, svd, dense (only rounds)."),
    ] = "ht",
    unit_order: UnitOrderOption = "auto",
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help="Bits of each number: 32 (as the model has them), 16, or 8 to 2 with scales; auto: what is best.",
            show_default="auto for bytes, 32 for numbers",
        ),
    ] = None,
    layers: Layers = "*",
    weights: Weights = None,
    names: Names = None,
    finetune: Finetune = True,
    steps: Steps = None,
    epochs: Epochs = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a checkpoint: calibrate, decompose, fine-tune, evaluate, write the output directory."""
    from htcompress.construction import Constructed
    from htcompress.request import Request
    from htcompress.sources.naming import names_of

    request = Request.of_options(
        budget=budget,
        error=error,
        ratio=ratio,
        scope=scope,
        layout=layout,
        format=form,
        unit_order=unit_order,
        bits=bits,
        layers=layers,
        finetuning=finetuning_of(steps, epochs, time_limit, seed) if finetune else None,
        seed=seed,
        task=None if task is None else str(task),
        weights=weights,
        device=device,
        names=names_of(names),
        model=Constructed.of_options(model, model_arguments, calibration, targets, metric),
    )
    place = output if output is not None else Path(f"{checkpoint.stem}-ht")
    from htcompress.directory.write import check_writable

    check_writable(place)
    from htcompress import compression, conversion
    from htcompress.graphs.calibration import Calibration

    given = Calibration(calibration, targets, metric)
    with open_screen(quiet) as screen:
        result = conversion.converted(checkpoint, request, given, observer=screen)
        screen.stage("writing")
        compression.save(result, place)
    _show(result, place, as_json)


def finetune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output directory of convert.")],
    task: TaskOption = None,
    model: ModelOption = None,
    model_arguments: ModelArguments = None,
    calibration: CalibrationOption = None,
    targets: Targets = None,
    metric: Metric = None,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="The dense checkpoint; by default the one the directory was made from."),
    ] = None,
    steps: Steps = None,
    epochs: Epochs = None,
    time_limit: TimeLimit = None,
    accumulate: Accumulate = None,
    mixed_precision: MixedPrecision = None,
    checkpoint_every: CheckpointEvery = None,
    checkpoint: CheckpointFolder = None,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue fine-tuning of an output directory; it is replaced when all is done.

    Several processes that accelerate launch or torchrun has started share the work.
    """
    from htcompress.finetuning.together import forgotten, joined

    with joined(device) as together, open_screen(quiet or together.index > 0) as screen:
        if forgotten():
            screen.message(
                "accelerate launch has started one process only. Without GPUs, --multi_gpu or torchrun start more."
            )
        # Inside, so that what is wrong is told once.
        precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
        options = finetuning_of(steps, epochs, time_limit, seed, accumulate, precision)
        checkpoints = checkpoints_of(directory, checkpoint_every, checkpoint, resume)
        from htcompress import compression, continuing, conversion
        from htcompress.construction import Constructed
        from htcompress.errors import RequestError

        asked = Constructed.of_options(model, model_arguments, calibration, targets, metric)
        if conversion.is_graph(directory):
            raise RequestError(
                f"{directory} holds a model that runs from its own file, which is fine-tuned while it is converted. "
                f"Convert it again with more --steps or --epochs."
            )
        from htcompress.directory.read import read_config
        from htcompress.directory.write import check_writable

        given = conversion.task_of(directory, task, asked, purpose="finetune", teacher=teacher, observer=screen)
        read_config(directory)
        if together.index == 0:
            check_writable(directory)
        result = continuing.finetune(
            directory,
            task=given,
            teacher=teacher,
            options=options,
            device=device,
            observer=screen,
            together=together,
            checkpoints=checkpoints,
        )
        if together.index == 0:
            screen.stage("writing")
            compression.save(result, directory)
            if checkpoints is not None:
                checkpoints.remove()
    if together.index == 0:
        _show(result, directory, as_json)


def evaluate(
    source: Annotated[Path, typer.Argument(metavar="DIR_OR_CKPT", help="An output directory, or a checkpoint.")],
    task: TaskOption = None,
    model: ModelOption = None,
    model_arguments: ModelArguments = None,
    calibration: CalibrationOption = None,
    targets: Targets = None,
    metric: Metric = None,
    weights: Weights = None,
    names: Names = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the task's metric of an output directory or a dense checkpoint; of ONNX and Keras also the outputs."""
    from htcompress import continuing, conversion
    from htcompress.construction import Constructed
    from htcompress.errors import RequestError
    from htcompress.graphs.calibration import Calibration
    from htcompress.sources.naming import names_of

    asked = Constructed.of_options(model, model_arguments, calibration, targets, metric)
    with open_screen(quiet) as screen:
        if asked is None and conversion.is_graph(source, task):
            if weights is not None or names is not None or device != "cpu":
                raise RequestError(f"{source} runs by itself, on the CPU: leave out --weights, --names and --device.")
            metrics = conversion.evaluated(source, Calibration(calibration, targets, metric), task)
        elif asked is None and task is not None and calibration is not None:
            raise RequestError("evaluate takes --task, or for ONNX and Keras --calibration; leave out one of them.")
        else:
            given = conversion.task_of(source, task, asked, purpose="evaluate", observer=screen)
            metrics = continuing.evaluate(
                source, task=given, weights=weights, names=names_of(names), device=device, observer=screen
            )
    if as_json:
        # JSON has no NaN: null, as everything that is not known.
        typer.echo(json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}, indent=2))
        return
    for name, value in metrics.items():
        typer.echo(f"{name}  {value:.6g}")


def _show(result: Compressed, place: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(result.report.to_json(), nl=False)
        return
    from rich.text import Text

    from htcompress.report.terminal import to_terminal

    console = result_console()
    console.print(to_terminal(result.report))
    files = ", ".join(["report.html", "report.json", "model.safetensors", *result.files])
    written = Text.assemble(" written to ", (str(place), "bold"), f"  ({files})")
    console.print(written, soft_wrap=True)

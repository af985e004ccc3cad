"""export: an output directory in a form that needs no htcompress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htcompress_cli.consoles import open_screen, result_console
from htcompress_cli.options import CalibrationOption, Debug, ModelArguments, ModelOption, Quiet, TaskOption


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output directory of convert.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What to write: model.pt, model.onnx, a folder for c.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORM",
            help="dense: weights for the original class; onnx: other runtimes; c: C99; keras: the file it came from.",
        ),
    ],
    task: TaskOption = None,
    model: ModelOption = None,
    model_arguments: ModelArguments = None,
    calibration: CalibrationOption = None,
    lengths: Annotated[
        bool,
        typer.Option("--lengths", help="Layers alone read the lengths of padded sequences (packed ones in torch)."),
    ] = False,
    states: Annotated[
        bool,
        typer.Option(
            "--states", help="The states of a whole model's layers are inputs and outputs, for calls in a row."
        ),
    ] = False,
    nonlinearity: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="tanh or relu: what an RNN alone computes, where no task has told it."),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For keras: the file that DIR was made from; by default where it was then."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Leave the format: dense weights for the original class, ONNX (checked against torch), C, or a file of Keras.

    For onnx a task (or a class and its data) gives the model around the layers; without one the recurrent layers are
    exported alone.
    """
    from htcompress import conversion, exporting
    from htcompress.construction import Constructed
    from htcompress.errors import RequestError
    from htcompress.report import words
    from htcompress.vocabulary import one_of

    destination = one_of(exporting.Destination, to, "--to")
    asked = Constructed.of_options(model, model_arguments, calibration)
    if asked is None and calibration is not None:
        raise RequestError("--calibration is for --model; leave it out.")
    with open_screen(quiet) as screen:
        given = task if asked is None else conversion.task_of(directory, task, asked, purpose="export", observer=screen)
        done = exporting.export(
            directory,
            out,
            to=destination,
            task=given,
            lengths=lengths,
            states=states,
            nonlinearity=nonlinearity,
            original=original,
            observer=screen,
        )
    console = result_console()
    for file in done.files:
        console.print(f" written to {file}  ({words.size(file.stat().st_size)})", soft_wrap=True)
    for note in done.notes:
        console.print(f" {note}", soft_wrap=True)
    for size in done.fixed:
        console.print(f" {size}: the model takes others in torch, this file does not", soft_wrap=True)
    if done.error is not None:
        console.print(f" largest difference between onnxruntime and torch: {done.error:.1g}")

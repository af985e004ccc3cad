"""sweep and compare: several compressions side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htcompress_cli.consoles import open_screen, result_console
from htcompress_cli.options import (
    CalibrationOption,
    Checkpoint,
    Debug,
    Device,
    EngineOption,
    Epochs,
    Finetune,
    Jobs,
    Json,
    Layers,
    Metric,
    ModelArguments,
    ModelOption,
    Names,
    Quiet,
    Scheduler,
    ScopeOption,
    Seed,
    Steps,
    StudyOutput,
    Targets,
    TaskOption,
    TimeLimit,
    Weights,
    finetuning_of,
)

if TYPE_CHECKING:
    from htcompress.study import Place, Study


def sweep(
    checkpoint: Checkpoint,
    budgets: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Sizes to look at: 1k,2k,5k, or bytes: 4kB,20kB.")
    ] = None,
    errors: Annotated[
        str | None, typer.Option(metavar="E,E,...", help="Or relative errors of the weights: 0.5,0.2.")
    ] = None,
    formats: Annotated[
        str, typer.Option(metavar="FORMAT,...", help="Formats to look at: ht, tt, tr, bt, svd, dense.")
    ] = "ht",
    task: TaskOption = None,
    model: ModelOption = None,
    model_arguments: ModelArguments = None,
    calibration: CalibrationOption = None,
    targets: Targets = None,
    metric: Metric = None,
    output: StudyOutput = None,
    scope: ScopeOption = "auto",
    layers: Layers = "*",
    weights: Weights = None,
    names: Names = None,
    finetune: Finetune = True,
    steps: Steps = None,
    epochs: Epochs = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    jobs: Jobs = None,
    engine: EngineOption = "local",
    scheduler: Scheduler = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Size against accuracy: compress to several budgets, in parallel. Started again, it goes on where it was."""
    from htcompress.numbers import budget_of, listed, real

    for text in listed(budgets):
        budget_of(text, "--budgets")
    limits = [real(text, "--errors", "0.5,0.2,0.1") for text in listed(errors)]
    tuning = finetuning_of(steps, epochs, time_limit, seed) if finetune else None
    place = _place(jobs, engine, scheduler)
    from htcompress.study import sweep

    folder = output if output is not None else Path(f"{checkpoint.stem}-sweep")
    source = _source(task, model, model_arguments, calibration, targets, metric, weights, names)
    options = {**source, "layers": layers, "scope": scope, "finetuning": tuning, "seed": seed, "device": device}
    with open_screen(quiet) as screen:
        made = sweep(
            checkpoint,
            folder,
            budgets=listed(budgets),
            errors=limits,
            formats=listed(formats),
            place=place,
            observer=screen,
            **options,
        )
    _show_study(made, folder, as_json)


def compare(
    checkpoint: Checkpoint,
    budget: Annotated[
        str, typer.Option(metavar="N", help="Numbers that the RNN may store (5000, 5k, 1.5m), or bytes (20kB).")
    ],
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT,...",
            help="Formats to look at.",
            show_default="ht,tt,tr,bt,svd for numbers; ht,svd,dense for bytes",
        ),
    ] = None,
    task: TaskOption = None,
    model: ModelOption = None,
    model_arguments: ModelArguments = None,
    calibration: CalibrationOption = None,
    targets: Targets = None,
    metric: Metric = None,
    output: StudyOutput = None,
    scope: ScopeOption = "auto",
    layers: Layers = "*",
    weights: Weights = None,
    names: Names = None,
    finetune: Finetune = True,
    steps: Steps = None,
    epochs: Epochs = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    jobs: Jobs = None,
    engine: EngineOption = "local",
    scheduler: Scheduler = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """HT beside tensor trains, tensor rings, block terms and truncated SVD at one budget, all treated alike."""
    from htcompress.numbers import budget_of, listed

    budget_of(budget, "--budget")
    tuning = finetuning_of(steps, epochs, time_limit, seed) if finetune else None
    place = _place(jobs, engine, scheduler)
    from htcompress.study import compare

    folder = output if output is not None else Path(f"{checkpoint.stem}-compare")
    source = _source(task, model, model_arguments, calibration, targets, metric, weights, names)
    options = {**source, "layers": layers, "scope": scope, "finetuning": tuning, "seed": seed, "device": device}
    with open_screen(quiet) as screen:
        made = compare(
            checkpoint, folder, budget=budget, formats=listed(formats) or None, place=place, observer=screen, **options
        )
    _show_study(made, folder, as_json)


def _source(
    task: str | None,
    model: str | None,
    arguments: str | None,
    calibration: Path | None,
    targets: str | None,
    metric: str | None,
    weights: str | None,
    names: str | None,
) -> dict[str, Any]:
    """What the model is and its data, as a study takes it."""
    from htcompress.construction import Constructed
    from htcompress.sources.naming import names_of

    made = Constructed.of_options(model, arguments)
    return {
        "task": task,
        "model": model,
        "model_arguments": None if made is None else made.arguments,
        "calibration": calibration,
        "targets": targets,
        "metric": metric,
        "weights": weights,
        "names": names_of(names),
    }


def _place(jobs: int | None, engine: str, scheduler: str | None) -> Place:
    from htcompress.study import Engine, Place
    from htcompress.vocabulary import one_of

    return Place(jobs, one_of(Engine, engine, "--engine"), scheduler)


def _show_study(made: Study, folder: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(made.to_json(), nl=False)
        return
    from rich.text import Text

    from htcompress.report.study_views import study_to_terminal

    console = result_console()
    console.print(study_to_terminal(made))
    places = "  (study.html, study.json; each point in points/)"
    console.print(Text.assemble(" written to ", (str(folder), "bold"), places), soft_wrap=True)

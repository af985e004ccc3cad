"""The commands: parse, call one library function, show. Heavy imports stand inside the commands."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htcompress.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from htcompress.finetuning.distill import FineTuning
    from htcompress.pipeline import Compressed
    from htcompress.planning import Goal
    from htcompress.study import Place, Study

app = typer.Typer(
    name="htcompress",
    help="Compress trained recurrent networks into Hierarchical Tucker form.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A trained state_dict: .pt, .pth, .ckpt, .safetensors.")
]
TaskOption = Annotated[
    str | None, typer.Option("--task", metavar="TASK", help="The task: a file (task.py) or a module (package.module).")
]
NeededTask = Annotated[
    str, typer.Option("--task", metavar="TASK", help="The task: a file (task.py) or a module (package.module).")
]
ScopeOption = Annotated[
    str, typer.Option(metavar="SCOPE", help="What is factored together: auto, integrated, separate, input.")
]
Layers = Annotated[str, typer.Option(metavar="GLOB", help="Which recurrent layers; the others stay dense.")]
Finetune = Annotated[bool, typer.Option("--finetune/--no-finetune", help="Distil from the dense model.")]
Steps = Annotated[str | None, typer.Option(metavar="N", help="Steps of fine-tuning.", show_default="400")]
TimeLimit = Annotated[
    str | None, typer.Option(metavar="SECONDS", help="Of fine-tuning; its schedule shortens with it.")
]
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


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("htcompress"))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    checkpoint: Checkpoint,
    layers: Annotated[str, typer.Option(metavar="GLOB", help="Which recurrent layers.")] = "*",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recurrent layers found, their sizes and spectra, and what a few budgets would give."""
    from htcompress.report.inspection import inspect_checkpoint, inspection_to_terminal

    found = inspect_checkpoint(checkpoint, layers=layers)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _console().print(inspection_to_terminal(found))


@app.command()
def convert(
    checkpoint: Checkpoint,
    budget: Annotated[
        str | None, typer.Option(metavar="N", help="Numbers that the RNN may store: 5000, 5k, 1.5m.")
    ] = None,
    error: Annotated[
        str | None, typer.Option(metavar="E", help="Instead: relative error that each weight matrix keeps to: 0.1.")
    ] = None,
    ratio: Annotated[str | None, typer.Option(metavar="R", help="Instead: how many times smaller: 100.")] = None,
    task: TaskOption = None,
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
        str, typer.Option("--format", metavar="FORMAT", help="ht, or for comparison tt, tr, bt, svd.")
    ] = "ht",
    layers: Layers = "*",
    finetune: Finetune = True,
    steps: Steps = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a checkpoint: calibrate, decompose, fine-tune, evaluate, write the output directory."""
    goal = _goal(budget, error, ratio, scope, layout, form)
    place = output if output is not None else Path(f"{checkpoint.stem}-ht")
    options = _finetuning(steps, time_limit, seed) if finetune else None
    from htcompress.checkpoint.directory import check_writable

    check_writable(place)
    from htcompress import pipeline

    with _screen(quiet) as screen:
        result = pipeline.convert(
            checkpoint,
            goal=goal,
            task=task,
            layers=layers,
            finetuning=options,
            seed=seed,
            device=device,
            observer=screen,
        )
        screen.stage("writing")
        pipeline.save(result, place)
    _show(result, place, as_json)


@app.command()
def finetune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output directory of convert.")],
    task: NeededTask,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="The dense checkpoint; by default the one the directory was made from."),
    ] = None,
    steps: Steps = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue fine-tuning of an output directory; it is replaced when all is done."""
    options = _finetuning(steps, time_limit, seed)
    from htcompress import pipeline
    from htcompress.checkpoint.directory import check_writable, read_config

    read_config(directory)
    check_writable(directory)
    with _screen(quiet) as screen:
        result = pipeline.finetune(
            directory, task=task, teacher=teacher, options=options, device=device, observer=screen
        )
        screen.stage("writing")
        pipeline.save(result, directory)
    _show(result, directory, as_json)


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="DIR_OR_CKPT", help="An output directory, or a checkpoint.")],
    task: NeededTask,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the task's metric of an output directory or of a dense checkpoint."""
    from htcompress import pipeline

    with _screen(quiet) as screen:
        metrics = pipeline.evaluate(source, task=task, device=device, observer=screen)
    if as_json:
        # JSON has no NaN: null, as everything that is not known.
        typer.echo(json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}, indent=2))
        return
    for name, value in metrics.items():
        typer.echo(f"{name}  {value:.6g}")


@app.command()
def sweep(
    checkpoint: Checkpoint,
    task: NeededTask,
    budgets: Annotated[str | None, typer.Option(metavar="N,N,...", help="Sizes to look at: 1k,2k,5k.")] = None,
    errors: Annotated[
        str | None, typer.Option(metavar="E,E,...", help="Or relative errors of the weights: 0.5,0.2.")
    ] = None,
    formats: Annotated[str, typer.Option(metavar="FORMAT,...", help="Formats to look at: ht, tt, tr, bt, svd.")] = "ht",
    output: StudyOutput = None,
    scope: ScopeOption = "auto",
    layers: Layers = "*",
    finetune: Finetune = True,
    steps: Steps = None,
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
    from htcompress_cli.numbers import listed, real, whole

    sizes = [whole(text, "--budgets", "1k,2k,5k") for text in listed(budgets)]
    limits = [real(text, "--errors", "0.5,0.2,0.1") for text in listed(errors)]
    tuning = _finetuning(steps, time_limit, seed) if finetune else None
    place = _place(jobs, engine, scheduler)
    folder = output if output is not None else Path(f"{checkpoint.stem}-sweep")
    from htcompress import study

    with _screen(quiet) as screen:
        made = study.sweep(
            checkpoint,
            folder,
            budgets=sizes,
            errors=limits,
            formats=listed(formats),
            task=task,
            layers=layers,
            scope=scope,
            finetuning=tuning,
            seed=seed,
            device=device,
            place=place,
            observer=screen,
        )
    _show_study(made, folder, as_json)


@app.command()
def compare(
    checkpoint: Checkpoint,
    budget: Annotated[str, typer.Option(metavar="N", help="Numbers that the RNN may store: 5000, 5k, 1.5m.")],
    task: NeededTask,
    formats: Annotated[
        str, typer.Option(metavar="FORMAT,...", help="Formats to look at: ht, tt, tr, bt, svd.")
    ] = "ht,tt,tr,bt,svd",
    output: StudyOutput = None,
    scope: ScopeOption = "auto",
    layers: Layers = "*",
    finetune: Finetune = True,
    steps: Steps = None,
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
    from htcompress_cli.numbers import listed, whole

    size = whole(budget, "--budget", "5000, 5k or 1.5m")
    tuning = _finetuning(steps, time_limit, seed) if finetune else None
    place = _place(jobs, engine, scheduler)
    folder = output if output is not None else Path(f"{checkpoint.stem}-compare")
    from htcompress import study

    with _screen(quiet) as screen:
        made = study.compare(
            checkpoint,
            folder,
            budget=size,
            formats=listed(formats),
            task=task,
            layers=layers,
            scope=scope,
            finetuning=tuning,
            seed=seed,
            device=device,
            place=place,
            observer=screen,
        )
    _show_study(made, folder, as_json)


def _place(jobs: int | None, engine: str, scheduler: str | None) -> Place:
    from htcompress.pipeline import one_of
    from htcompress.study import Engine, Place

    return Place(jobs, one_of(Engine, engine, "--engine"), scheduler)


def _show_study(made: Study, folder: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(made.to_json(), nl=False)
        return
    from rich.text import Text

    from htcompress.report.study_views import study_to_terminal

    console = _console()
    console.print(study_to_terminal(made))
    places = "  (study.html, study.json; each point in points/)"
    console.print(Text.assemble(" written to ", (str(folder), "bold"), places), soft_wrap=True)


def _goal(budget: str | None, error: str | None, ratio: str | None, scope: str, layout: str, form: str) -> Goal:
    from htcompress_cli.numbers import real, whole

    numbers = (
        None if budget is None else whole(budget, "--budget", "5000, 5k or 1.5m"),
        None if error is None else real(error, "--error", "0.1"),
        None if ratio is None else real(ratio, "--ratio", "100"),
    )
    if all(number is None for number in numbers):
        raise RequestError(
            "convert needs a goal: --budget N (numbers to store, such as 5000 or 5k), --error E (relative error of the "
            "weights, such as 0.1) or --ratio R (times smaller, such as 100)."
        )
    from htcompress.formats import Format
    from htcompress.matrix import LayoutKind
    from htcompress.pipeline import one_of
    from htcompress.planning.goal import Goal, Scope

    forms = one_of(Scope, scope, "--scope"), one_of(LayoutKind, layout, "--layout"), one_of(Format, form, "--format")
    return Goal(*numbers, *forms)


def _finetuning(steps: str | None, time_limit: str | None, seed: int) -> FineTuning:
    from htcompress_cli.numbers import real, whole

    count = None if steps is None else whole(steps, "--steps", "400 or 1k")
    if count is not None and count < 0:
        raise RequestError(f"--steps is a number of steps, at least 0; found {steps}.")
    seconds = None if time_limit is None else real(time_limit, "--time-limit", "60")
    if seconds is not None and seconds <= 0:
        raise RequestError(f"--time-limit is a number of seconds, above 0; found {time_limit}.")
    from htcompress.finetuning.distill import FineTuning

    options = FineTuning(seed=seed, time_limit=seconds)
    return options if count is None else replace(options, steps=count)


def _screen(quiet: bool) -> Any:
    from htcompress_cli.screen import Screen

    return Screen(quiet=quiet)


def _console() -> Console:
    from rich.console import Console

    class Results(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to the entry point: a reader that has seen enough is no failed check."""
            raise BrokenPipeError

    # No markup: layers, metrics and files bear the names that the user gave them.
    return Results(width=80 if not sys.stdout.isatty() else None, highlight=False, markup=False, emoji=False)


def _show(result: Compressed, place: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(result.report.to_json(), nl=False)
        return
    from rich.text import Text

    from htcompress.report.terminal import to_terminal

    console = _console()
    console.print(to_terminal(result.report))
    written = Text.assemble(" written to ", (str(place), "bold"), "  (report.html, report.json, model.safetensors)")
    console.print(written, soft_wrap=True)

"""check: a report held against limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htcompress.errors import RequestError
from htcompress_cli.consoles import result_console
from htcompress_cli.options import Debug, Json

if TYPE_CHECKING:
    from htcompress.checks import Verdict

AGAINST = "Limits against a baseline"


def _limit(metavar: str, explained: str) -> Any:
    return typer.Option(metavar=metavar, help=explained, rich_help_panel="Limits")


def _change(metavar: str, explained: str) -> Any:
    return typer.Option(metavar=metavar, help=explained, rich_help_panel=AGAINST)


def check(
    report: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR_OR_REPORT",
            help="An output directory or its report.json; without one, the targets of pyproject.toml.",
            show_default=False,
        ),
    ] = None,
    max_parameters: Annotated[str | None, _limit("N", "Numbers that the RNN stores.")] = None,
    min_ratio: Annotated[str | None, _limit("R", "Times smaller than the dense RNN.")] = None,
    max_bytes: Annotated[str | None, _limit("N", "Bytes that the RNN stores.")] = None,
    max_macs: Annotated[str | None, _limit("N", "Multiplications of the RNN per time step.")] = None,
    min_metric: Annotated[str | None, _limit("X", "Floor of the task's metric.")] = None,
    max_metric: Annotated[str | None, _limit("X", "Ceiling of a metric where lower is better.")] = None,
    max_drop: Annotated[str | None, _limit("X", "Loss of the metric against the dense model: 0.01.")] = None,
    max_output_error: Annotated[str | None, _limit("E", "Relative output error of any matrix: 0.05.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="REPORT", help="An earlier report or output directory.", rich_help_panel=AGAINST),
    ] = None,
    max_parameters_change: Annotated[str | None, _change("N", "More numbers than there: 100, 5%.")] = None,
    max_bytes_change: Annotated[str | None, _change("N", "More bytes: 400, 5%.")] = None,
    max_macs_change: Annotated[str | None, _change("N", "More multiplications: 1k, 5%.")] = None,
    max_metric_change: Annotated[str | None, _change("X", "Worse metric: 0.01, 1%.")] = None,
    max_output_error_change: Annotated[str | None, _change("E", "More output error: 0.02, 5%.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A target of the configuration; may be repeated.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A TOML file.", show_default="the nearest pyproject.toml"),
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JUnit XML too.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    r"""Hold a report against limits, for CI: exit code 0 if all hold, 1 if one fails, 2 if one cannot be looked at.

    Limits also stand in \[tool.htcompress.check] of pyproject.toml, under the same names: max_parameters = 5000.
    """
    limits = {
        "max_parameters": max_parameters,
        "min_ratio": min_ratio,
        "max_bytes": max_bytes,
        "max_macs": max_macs,
        "min_metric": min_metric,
        "max_metric": max_metric,
        "max_drop": max_drop,
        "max_output_error": max_output_error,
        "max_parameters_change": max_parameters_change,
        "max_bytes_change": max_bytes_change,
        "max_macs_change": max_macs_change,
        "max_metric_change": max_metric_change,
        "max_output_error_change": max_output_error_change,
    }
    from htcompress.checks import exit_code, judge, read_targets, views

    given = {name: text for name, text in limits.items() if text is not None}
    targets = read_targets(report, names=target or (), config=config, options=given, baseline=baseline)
    verdicts = judge(targets)
    if as_json:
        typer.echo(views.to_json(verdicts), nl=False)
    else:
        result_console().print(views.to_terminal(verdicts))
    if junit is not None:
        try:
            junit.write_text(views.to_junit(verdicts), encoding="utf-8")
        except OSError as error:
            raise RequestError(f"--junit {junit} cannot be written: {error}.") from error
    _tell_github(verdicts)
    code = exit_code(verdicts)
    if code == 2:
        named = [(f"{v.target.name}: " if v.target.name else "", problem) for v in verdicts for problem in v.problems]
        raise RequestError(" ".join(f"{name}{problem}" for name, problem in named))
    raise typer.Exit(code)


def _tell_github(verdicts: Sequence[Verdict]) -> None:
    """Annotations and the step summary, where this is a job of GitHub Actions."""
    from htcompress.checks import views

    if os.environ.get("GITHUB_ACTIONS") == "true":
        # The runner reads both streams; stdout may be somebody's JSON.
        for line in views.to_annotations(verdicts):
            print(line, file=sys.stderr)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(views.to_markdown(verdicts) + "\n")
        except OSError as error:
            print(f"note: the step summary {summary} cannot be written: {error}", file=sys.stderr)

"""Views of a study: a table of its points for a terminal, the same in Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from htcompress.report import words
from htcompress.report.study import Point, Study
from htcompress.report.terminal import WIDTH
from htcompress.vocabulary import Format

TITLES = {"sweep": "Size against accuracy", "compare": "Formats side by side"}


@dataclass(frozen=True)
class Row:
    """A line of the table; `name` is that of its output directory, None where there is none."""

    cells: tuple[str, ...]
    best: bool = False
    name: str | None = None


def heads(study: Study) -> tuple[str, ...]:
    """The names of the columns."""
    metric = study.metric or "metric"
    return (
        "format",
        "asked for",
        "numbers",
        "size",
        "smaller",
        "output lost",
        "before tuning",
        f"{metric} after",
        "ms",
    )


def rows(study: Study) -> list[Row]:
    """The dense model and the points: a comparison's best first, a sweep's in the order that was asked for."""
    dense = study.dense
    ordered = study.best_first() if study.kind == "compare" else list(study.points)
    first = (
        "dense",
        "",
        words.count(dense.parameters),
        words.size(dense.bytes),
        "",
        "",
        "",
        words.metric(dense.metric),
        words.milliseconds(dense.latency_ms),
    )
    found = [Row(first)]
    for index, point in enumerate(ordered):
        best = study.kind == "compare" and index == 0 and point.final is not None
        name = None if point.parameters is None else point.case.name
        found.append(Row(_cells(point), best, name))
    return found


def notes(study: Study) -> list[str]:
    """What a reader should know beside the numbers."""
    if study.metric is None:
        if study.request.get("task") is None:
            return ["Accuracy was not looked at: give data with --calibration X.npz."]
        return ["Accuracy was not looked at: the task has no evaluate(model)."]
    return []


def made_by(study: Study) -> str:
    """How the study was made, in a line."""
    steps, epochs = study.request["steps"], study.request.get("epochs")
    tuned = "no fine-tuning" if steps == 0 else f"{steps} steps of fine-tuning"
    if steps is None:
        tuned = "fine-tuned while it helped" if epochs is None else f"{epochs} epochs of fine-tuning"
    latency = "" if study.latency is None else f" ms: {study.latency}."
    return f"htcompress {study.version}, seed {study.request['seed']}, {tuned}.{latency}"


def study_to_terminal(study: Study) -> RenderableType:
    """The study as something rich can print, 80 columns wide."""
    table = Table(box=None, header_style="dim", pad_edge=False, expand=True)
    for index, head in enumerate(heads(study)):
        # The last words of two go below the first, but for "asked for". A metric's name breaks where it can.
        lines = head if head == "asked for" else "\n".join(head.replace("_", " ").rsplit(" ", 1))
        table.add_column(lines, justify="right" if index else "left", overflow="fold")
    dense, *others = rows(study)
    table.add_row(*dense.cells, style="dim")
    for row in others:
        table.add_row(*row.cells, style="bold" if row.best else None)
    title = Text.assemble(("htcompress ", "bold"), (study.kind, "bold"), "  ", (str(study.source["file"]), "bold cyan"))
    panel = Panel(table, title=title, title_align="left", box=box.ROUNDED, padding=(0, 1), width=WIDTH)
    return Group(panel, *(Padding(Text(note, style="yellow"), (0, 2)) for note in notes(study)))


def study_to_markdown(study: Study) -> str:
    """The study as Markdown text."""
    lines = [
        f"# {study.source['file']}: {TITLES[study.kind].lower()}",
        "",
        "| " + " | ".join(heads(study)) + " |",
        "|---|" + "---:|" * (len(heads(study)) - 1),
    ]
    for row in rows(study):
        first, *others = row.cells
        lines.append("| " + " | ".join([f"**{first}**" if row.best else first, *others]) + " |")
    for note in notes(study):
        lines += ["", note]
    lines += ["", made_by(study), ""]
    return "\n".join(lines)


def _cells(point: Point) -> tuple[str, ...]:
    case = point.case
    asked = [f"{case.budget:,}"] if case.budget is not None else []
    asked += [f"error {case.error:g}"] if case.error is not None else []
    asked += [words.size(case.bytes)] if case.bytes is not None else []
    asked += [f"{case.bits} bits"] if case.bits is not None else []
    name = case.format if case.format == Format.DENSE else case.format.upper()
    if point.parameters is None:
        least = f"{point.least:,}" if case.bytes is None else words.size(point.least or 0)
        return (name, ", ".join(asked), f"{least} at least", "", "", "", "", "", "")
    return (
        name,
        ", ".join(asked),
        words.count(point.parameters),
        words.size(point.bytes or 0),
        f"{point.ratio:,.4g}x" if point.ratio and point.ratio < 1000 else f"{point.ratio or 0:,.0f}x",
        words.percent(point.output_error),
        words.metric(point.decomposed),
        words.metric(point.final if point.finetuned is not None else None),
        words.milliseconds(point.latency_ms),
    )

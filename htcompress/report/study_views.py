"""Views of a study: a table of its points for a terminal, the same in Markdown."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from htcompress.report import words
from htcompress.report.study import Point, Study
from htcompress.report.terminal import WIDTH


def study_to_terminal(study: Study) -> RenderableType:
    """The study as something rich can print, 80 columns wide."""
    metric = study.metric or "metric"
    table = Table(box=None, header_style="dim", pad_edge=False, expand=True)
    for head in (
        "format",
        "asked for",
        "numbers",
        "smaller",
        "output\nlost",
        "before\ntuning",
        f"{metric}\nafter",
        "ms",
    ):
        table.add_column(head, justify="left" if head == "format" else "right", overflow="fold")
    dense = study.dense
    ms = words.milliseconds(dense.latency_ms)
    table.add_row("dense", "", words.count(dense.parameters), "", "", "", words.metric(dense.metric), ms, style="dim")
    best = _best(study)
    for point in _ordered(study):
        row = _row(point)
        table.add_row(*row, style="bold" if point is best else None)
    title = Text.assemble(("htcompress ", "bold"), (study.kind, "bold"), "  ", (str(study.source["file"]), "bold cyan"))
    panel = Panel(table, title=title, title_align="left", box=box.ROUNDED, padding=(0, 1), width=WIDTH)
    return Group(panel, *(Padding(Text(note, style="yellow"), (0, 2)) for note in _notes(study)))


def study_to_markdown(study: Study) -> str:
    """The study as Markdown text."""
    dense, metric = study.dense, study.metric or "metric"
    title = {"sweep": "Size against accuracy", "compare": "Formats side by side"}[study.kind]
    lines = [
        f"# {study.source['file']}: {title.lower()}",
        "",
        f"| format | asked for | numbers | | output lost | {metric} before fine-tuning | {metric} after | ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| dense | | {words.count(dense.parameters)} | | | | {words.metric(dense.metric)} | "
        f"{words.milliseconds(dense.latency_ms)} |",
    ]
    best = _best(study)
    for point in _ordered(study):
        row = _row(point)
        if point is best:
            row[0] = f"**{row[0]}**"
        lines.append("| " + " | ".join(row) + " |")
    for note in _notes(study):
        lines += ["", note]
    steps = study.request["steps"]
    tuned = f"{steps} steps of fine-tuning" if steps else "no fine-tuning"
    latency = "" if study.latency is None else f" ms: {study.latency}."
    lines += ["", f"htcompress {study.version}, seed {study.request['seed']}, {tuned}.{latency}", ""]
    return "\n".join(lines)


def _ordered(study: Study) -> list[Point]:
    """A comparison lists the best first, a sweep keeps the order that was asked for."""
    return study.best_first() if study.kind == "compare" else list(study.points)


def _best(study: Study) -> Point | None:
    """The best of a comparison; a sweep's is for the reader to choose."""
    first = study.best_first()[0]
    return first if study.kind == "compare" and first.final is not None else None


def _row(point: Point) -> list[str]:
    case = point.case
    asked = f"{case.budget:,}" if case.budget is not None else f"error {case.error:g}"
    if point.parameters is None:
        return [case.format.upper(), asked, f"{point.least:,} at least", "", "", "", "", ""]
    return [
        case.format.upper(),
        asked,
        words.count(point.parameters),
        f"{point.ratio:,.4g}x" if point.ratio and point.ratio < 1000 else f"{point.ratio or 0:,.0f}x",
        words.percent(point.output_error),
        words.metric(point.decomposed),
        words.metric(point.final if point.finetuned is not None else None),
        words.milliseconds(point.latency_ms),
    ]


def _notes(study: Study) -> list[str]:
    if study.metric is None:
        return ["Accuracy was not looked at: the task has no evaluate(model)."]
    return []

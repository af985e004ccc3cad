"""The report on a terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from htcompress.report import words
from htcompress.report.report import MatrixReport, Report

WIDTH = 80


def to_terminal(report: Report) -> RenderableType:
    """The report as something rich can print."""
    parts: list[RenderableType] = [_headline(report), *_layers(report)]
    parts += [Padding(Text(note, style="yellow"), (0, 2, 1, 2)) for note in words.notes(report)]
    return Group(*parts)


def _headline(report: Report) -> RenderableType:
    t, q = report.totals, report.quality
    table = Table(box=None, show_header=True, header_style="dim", pad_edge=False, expand=True)
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("compressed", justify="right", style="bold")
    table.add_column("", justify="right", style="green")
    for name, write, before, after in (
        ("RNN parameters", words.count, t.parameters_before, t.parameters_after),
        ("RNN size", words.size, t.bytes_before, t.bytes_after),
        ("multiplications per step", words.count, t.macs_per_step_before, t.macs_per_step_after),
        ("model parameters", words.count, t.model_parameters_before, t.model_parameters_after),
    ):
        table.add_row(name, write(before), write(after), words.ratio(before, after))
    if q.metric is not None:
        table.add_row(
            q.metric,
            words.metric(q.dense),
            words.metric(q.final),
            Text(words.change(q), style="red" if words.worse(q) else "green"),
        )
        if q.finetuned is not None:
            table.add_row(Text("  before fine-tuning", style="dim"), "", Text(words.metric(q.decomposed), "dim"), "")
    title = Text.assemble(("htcompress  ", "bold"), (str(report.source["file"]), "bold cyan"))
    return Panel(table, title=title, title_align="left", box=box.ROUNDED, padding=(0, 1), width=WIDTH)


def _layers(report: Report) -> list[RenderableType]:
    """Each layer's name above a table of its matrices; the tables have one header and the same columns."""
    matrices = [matrix for layer in report.layers for matrix in layer.matrices]
    names = {id(m): m.name.removeprefix(f"{layer.name}.") for layer in report.layers for m in layer.matrices}
    columns: list[tuple[str, Callable[[MatrixReport], str]]] = [
        ("matrix", lambda m: names[id(m)]),
        ("shape", lambda m: f"{m.shape[0]}×{m.shape[1]}"),
        ("rows | columns", words.form),
        ("rank", words.rank),
        ("numbers", lambda m: words.count(m.parameters)),
        ("lost of\nweights", lambda m: words.percent(m.error["weights"])),
        ("lost of\noutput", lambda m: words.percent(m.error["outputs"])),
    ]
    widths = [max(map(len, [*head.split("\n"), *map(write, matrices)])) for head, write in columns]
    shown: list[RenderableType] = []
    for index, layer in enumerate(report.layers):
        title = Text.assemble((layer.name or "(top level)", "bold"), f"  {words.layer(layer.settings)}")
        table = Table(
            box=box.SIMPLE_HEAD,
            header_style="dim",
            pad_edge=False,
            padding=(0, 1, 0, 0),
            show_header=index == 0,
            width=WIDTH - 2,
        )
        for (head, _), width in zip(columns, widths, strict=True):
            if head == "rows | columns":
                table.add_column(head, overflow="fold", ratio=1)
            else:
                right = head != "matrix"
                table.add_column(head, justify="right" if right else "left", width=min(width, 16), overflow="fold")
        for matrix in layer.matrices:
            table.add_row(*(write(matrix) for _, write in columns), style="dim" if matrix.kept_dense else None)
        # A table ends with an empty line of its own.
        shown += [Padding(title, (int(index == 0), 1, 0, 1)), Padding(table, (0, 0, 0, 1))]
    return shown

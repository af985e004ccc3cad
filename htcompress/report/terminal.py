"""The report on a terminal, 80 columns wide."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from htcompress.report import words
from htcompress.report.report import Report

WIDTH = 80


def to_terminal(report: Report) -> RenderableType:
    """The report as something rich can print."""
    parts: list[RenderableType] = [_headline(report), Padding(_matrices(report), (0, 0, 0, 1))]
    if report.quality.metric is None:
        parts.append(Padding(Text(words.NOT_LOOKED_AT, style="yellow"), (1, 2, 0, 2)))
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
        worse = q.final is not None and q.dense is not None and (q.final < q.dense) == q.higher_is_better
        worse = worse and q.final != q.dense
        table.add_row(
            q.metric,
            words.metric(q.dense),
            words.metric(q.final),
            Text(words.change(q), style="red" if worse else "green"),
        )
        if q.finetuned is not None:
            table.add_row(Text("  before fine-tuning", style="dim"), "", Text(words.metric(q.decomposed), "dim"), "")
    title = Text.assemble(("htcompress  ", "bold"), (str(report.source["file"]), "bold cyan"))
    return Panel(table, title=title, title_align="left", box=box.ROUNDED, padding=(0, 1), width=WIDTH)


def _matrices(report: Report) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, width=WIDTH - 2)
    table.add_column("matrix", overflow="fold", min_width=14)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("rows | cols", overflow="fold", ratio=1)
    table.add_column("rank", justify="right")
    table.add_column("numbers", justify="right")
    table.add_column("lost of\nweights", justify="right")
    table.add_column("lost of\noutput", justify="right")
    for layer in report.layers:
        for m in layer.matrices:
            table.add_row(
                m.name,
                f"{m.shape[0]}×{m.shape[1]}",
                words.form(m),
                words.rank(m),
                words.count(m.parameters),
                words.percent(m.error["weights"]),
                words.percent(m.error["outputs"]),
                style="dim" if m.kept_dense else None,
            )
    return table

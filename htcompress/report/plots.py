"""Drawings for the HTML report: SVG that takes the page's colours, light or dark.

Lines and text that stand for ink are drawn in one marker colour, which becomes `currentColor`; matplotlib's output is
made the same in every run.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from htcompress.report import words
from htcompress.report.report import MatrixReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from htcompress.report.study import Point, Study

_INK = "#010203"
_ACCENT = "#0d7a5f"
_COLOURS = ("#0d7a5f", "#c2571a", "#6a4fb3", "#b03060", "#7a7a1f")
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "htcompress",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@contextmanager
def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element that scales with the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_ACCENT, "var(--accent)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids would clash between the drawings of one page.
    prefix = re.sub(r"\W+", "-", label.lower())
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    named = f'role="img" aria-label="{html.escape(label)}"'
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: named, text, count=1)
    return text.strip()


def trade_off(report: Report) -> str | None:
    """Size against the output's expected error, with the dense model and the chosen point; None without a curve.

    Sizes are bytes where bytes were asked for, and numbers else.
    """
    if len(report.frontier) < 2:
        return None
    t = report.totals
    in_bytes = report.request.get("bytes") is not None
    before, after = (t.bytes_before, t.bytes_after) if in_bytes else (t.parameters_before, t.parameters_after)
    said = words.size if in_bytes else words.count
    with _figure(6.4, 3.2) as (figure, ((axes,),)):
        sizes = [size for size, _ in report.frontier]
        errors = [100 * error for _, error in report.frontier]
        axes.plot(sizes, errors, "-", color=_ACCENT, linewidth=1.8, label="expected by the plan")
        axes.plot([after], [errors[-1]], "o", color=_ACCENT, markersize=8, label="chosen")
        axes.plot([before], [0], "s", color=_INK, markersize=7, label="dense")
        _sizes(axes)
        axes.set_ylim(bottom=min(-3, -0.05 * max(errors)))
        axes.set_xlabel("stored bytes" if in_bytes else "stored numbers")
        axes.set_ylabel("output lost, %")
        axes.legend()
        _annotate(axes, after, errors[-1], said(after))
        _annotate(axes, before, 0, said(before))
        return _svg(figure, f"Stored {'bytes' if in_bytes else 'numbers'} against the error of the output")


def curve(study: Study) -> str | None:
    """Numbers against the metric, a line for each format; None where nothing was measured."""
    points = [p for p in study.points if p.parameters is not None and p.final is not None]
    if not points:
        return None
    with _figure(6.4, 3.8) as (figure, ((axes,),)):
        in_bytes = any(p.case.bytes is not None or p.case.bits is not None for p in points)
        formats = list(dict.fromkeys(p.case.format for p in points))
        for form, colour in zip(formats, _COLOURS, strict=False):
            own = sorted((p for p in points if p.case.format == form), key=lambda p: _size(p, in_bytes))
            sizes = [_size(p, in_bytes) for p in own]
            axes.plot(sizes, [p.final for p in own], "o-", color=colour, linewidth=1.8, label=form.upper())
            if any(p.finetuned is not None for p in own):
                axes.plot(sizes, [p.decomposed for p in own], "o:", color=colour, alpha=0.6, markersize=4)
        dense = study.dense
        if dense.metric is not None:
            axes.axhline(dense.metric, color=_INK, linewidth=0.8, linestyle="--")
            own_size = dense.bytes if in_bytes else dense.parameters
            axes.plot([own_size], [dense.metric], "s", color=_INK, markersize=7, label="dense")
        _sizes(axes)
        axes.set_xlabel("stored bytes" if in_bytes else "stored numbers")
        axes.set_ylabel(study.metric, parse_math=False)
        axes.legend()
        return _svg(figure, f"Stored {'bytes' if in_bytes else 'numbers'} against the metric")


def _size(point: Point, in_bytes: bool) -> int:
    """What a point takes, on the axis of a curve."""
    return (point.bytes if in_bytes else point.parameters) or 0


def spectrum(matrix: MatrixReport) -> str | None:
    """The singular values of a matrix in its metric, and the rank that is kept; None where they are not known."""
    if not matrix.spectrum:
        return None
    with _figure(3.2, 2.0) as (figure, ((axes,),)):
        axes.semilogy(range(1, len(matrix.spectrum) + 1), matrix.spectrum, ".-", color=_ACCENT, markersize=4)
        kept = words.rank(matrix)
        if matrix.layout not in words.PAIRED and int(kept) <= len(matrix.spectrum):
            axes.axvline(int(kept), color=_INK, linewidth=0.8, linestyle="--")
            axes.annotate(f"rank {kept}", (int(kept), 1), xytext=(4, -2), textcoords="offset points", fontsize=9)
        axes.set_xlabel("singular value")
        return _svg(figure, f"Spectrum of {matrix.name}")


def tree(matrix: MatrixReport) -> str | None:
    """The dimension tree with the modes at its leaves and the ranks at its edges; None for what has no tree."""
    if not isinstance(matrix.tree, list) or not matrix.tree:
        return None
    leaves = list(_leaves(matrix.tree))
    depth = _depth(matrix.tree)
    with _figure(max(2.4, 0.85 * len(leaves) + 0.4), 0.75 * depth + 0.9) as (figure, ((axes,),)):
        axes.axis("off")
        axes.set_xlim(-0.6, len(leaves) - 0.4)
        axes.set_ylim(-0.75, depth + 0.3)
        _draw(axes, matrix, matrix.tree, {leaf: k for k, leaf in enumerate(leaves)}, depth)
        return _svg(figure, f"Dimension tree of {matrix.name}")


def _draw(axes: Axes, matrix: MatrixReport, node: Any, places: dict[int, int], height: float) -> float:
    """Draw a node with what is below it; its horizontal place."""
    if isinstance(node, int):
        m, n = matrix.row_modes[node], matrix.col_modes[node]
        label = f"{m}×{n}" if m > 1 and n > 1 else str(m * n)
        side = "" if m > 1 and n > 1 else ("rows" if n == 1 and m > 1 else "columns")
        x = float(places[node])
        axes.text(x, -0.22, label, ha="center", va="top", fontsize=10)
        axes.text(x, -0.52, side, ha="center", va="top", fontsize=7.5, alpha=0.75)
        axes.plot([x], [0], "o", color=_ACCENT, markersize=7)
        return x
    xs = []
    for child in node:
        low = 0.0 if isinstance(child, int) else height - 1
        x = _draw(axes, matrix, child, places, low)
        xs.append((x, low, "+".join(map(str, sorted(_leaves(child))))))
    here = sum(x for x, _, _ in xs) / len(xs)
    for x, low, name in xs:
        axes.plot([here, x], [height, low], "-", color=_INK, linewidth=1, zorder=0)
        rank = matrix.ranks.get(name, "")
        middle = (0.45 * here + 0.55 * x, 0.45 * height + 0.55 * low)
        axes.annotate(
            str(rank),
            middle,
            xytext=(5 if x >= here else -5, 0),
            textcoords="offset points",
            ha="left" if x >= here else "right",
            va="center",
            fontsize=9,
            color=_ACCENT,
        )
    axes.plot([here], [height], "o", color=_ACCENT, markersize=7)
    return here


def _leaves(node: Any) -> Iterator[int]:
    if isinstance(node, int):
        yield node
    else:
        for child in node:
            yield from _leaves(child)


def _depth(node: Any) -> int:
    return 0 if isinstance(node, int) else 1 + max(_depth(child) for child in node)


def _sizes(axes: Axes) -> None:
    """A logarithmic axis with the numbers written out."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: words.count(round(value)))


def _annotate(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9)

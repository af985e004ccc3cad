"""How the views of a report write numbers."""

from __future__ import annotations

from htcompress.report.report import MatrixReport, Quality


def count(number: int) -> str:
    """A number with thousands apart: 938,496."""
    return f"{number:,}"


def size(number: int) -> str:
    """Bytes in decimal units: 3.75 MB."""
    value = float(number)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "bytes" else f"{number} bytes"
        value /= 1000
    return f"{value:.3g} GB"


def ratio(before: float, after: float) -> str:
    """How many times smaller, or larger: 188x smaller."""
    if before == after or not after:
        return "same"
    return f"{before / after:,.4g}x smaller" if before > after else f"{after / before:,.3g}x larger"


def percent(value: float | None) -> str:
    """A relative error; a dash where it was not measured."""
    return "-" if value is None else f"{100 * value:.3g} %"


def metric(value: float | None) -> str:
    """A metric; a dash where it was not measured."""
    return "-" if value is None else f"{value:.4f}"


def change(quality: Quality) -> str:
    """The final metric against the dense one, with its sign."""
    if quality.final is None or quality.dense is None:
        return ""
    return f"{quality.final - quality.dense:+.4f}"


def form(matrix: MatrixReport) -> str:
    """The layout in a few characters: 4·8·8 | 60·60."""
    if matrix.kept_dense:
        return "dense"
    if matrix.layout == "paired":
        return " ".join(f"{m}×{n}" for m, n in zip(matrix.row_modes, matrix.col_modes, strict=True))
    rows = [m for m, n in zip(matrix.row_modes, matrix.col_modes, strict=True) if n == 1 and m > 1]
    cols = [n for m, n in zip(matrix.row_modes, matrix.col_modes, strict=True) if m == 1 and n > 1]
    return f"{'·'.join(map(str, rows)) or '1'} | {'·'.join(map(str, cols)) or '1'}"


def rank(matrix: MatrixReport) -> str:
    """The rank between rows and columns for a split layout; the largest rank for a paired one."""
    if matrix.kept_dense:
        return ""
    ranks = list(matrix.ranks.values())
    # Post-order: the last is the root, the one before it is the root's right child.
    return str(ranks[-2] if matrix.layout != "paired" and len(ranks) > 1 else max(ranks))


NOT_LOOKED_AT = (
    "Accuracy was not looked at: without a task there is no data to measure, weigh or fine-tune on. "
    "Weights of trained RNNs alone say little about what a model does; give --task before you rely on it."
)

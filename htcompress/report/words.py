"""How the views of a report write numbers and layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from htcompress.report.report import MatrixReport, Quality, Report
from htcompress.vocabulary import Kind


def count(number: int) -> str:
    """A number with thousands apart: 938,496."""
    return f"{number:,}"


def size(number: int) -> str:
    """Bytes in decimal units: 3.75 MB."""
    value = float(number)
    if number < 1000:
        return f"{number} bytes"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        # Below what three digits would round up to a thousand.
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:,.3g} TB"


def ratio(before: float, after: float) -> str:
    """How many times smaller, or larger: 188x smaller."""
    if before == after or not after:
        return "same"
    return f"{_times(before / after)} smaller" if before > after else f"{_times(after / before)} larger"


def _times(factor: float) -> str:
    return f"{factor:,.0f}x" if factor >= 1000 else f"{factor:.4g}x"


def percent(value: float | None) -> str:
    """A relative error; a dash where it was not measured."""
    return "-" if value is None else f"{100 * value:.3g} %"


def metric(value: float | None) -> str:
    """A metric; a dash where it was not measured."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    """A latency in milliseconds; a dash where it was not measured."""
    return "-" if value is None else f"{value:.3g}"


def change(quality: Quality) -> str:
    """The final metric against the dense one, with its sign."""
    if quality.final is None or quality.dense is None:
        return ""
    return f"{quality.final - quality.dense:+.4f}"


def worse(quality: Quality) -> bool:
    """Whether the final metric is worse than the dense model's."""
    if quality.final is None or quality.dense is None or quality.final == quality.dense:
        return False
    return (quality.final < quality.dense) == quality.higher_is_better


def layer(settings: Mapping[str, Any]) -> str:
    """What a layer is, from its settings: LSTM 3600 to 64, 2 layers, both directions."""
    kind = Kind(settings["kind"]).module + (" cell" if settings["cell"] else "")
    parts = [f"{kind} {settings['input_size']} to {settings['hidden_size']}"]
    if settings["num_layers"] > 1:
        parts.append(f"{settings['num_layers']} layers")
    if settings["bidirectional"]:
        parts.append("both directions")
    if settings["proj_size"]:
        parts.append(f"projected to {settings['proj_size']}")
    return ", ".join(parts)


def form(matrix: MatrixReport) -> str:
    """The layout in a few characters: 4·8·8 | 60·60."""
    if not matrix.ranks:
        return "dense"
    if matrix.layout in PAIRED:
        return " ".join(f"{m}×{n}" for m, n in zip(matrix.row_modes, matrix.col_modes, strict=True))
    rows = [m for m, n in zip(matrix.row_modes, matrix.col_modes, strict=True) if n == 1 and m > 1]
    cols = [n for m, n in zip(matrix.row_modes, matrix.col_modes, strict=True) if m == 1 and n > 1]
    return f"{'·'.join(map(str, rows)) or '1'} | {'·'.join(map(str, cols)) or '1'}"


def rank(matrix: MatrixReport) -> str:
    """The rank between rows and columns for a split layout; the largest rank for a paired one; none of no factors."""
    if not matrix.ranks:
        return ""
    ranks = list(matrix.ranks.values())
    # Post-order: the last is the root, the one before it is the root's right child.
    return str(ranks[-2] if matrix.layout not in PAIRED and len(ranks) > 1 else max(ranks))


def sensitive(report: Report) -> str | None:
    """Names the matrices that lose half of what they put out or more; None where there are none."""
    lost = {m.name: m.error["outputs"] for layer in report.layers for m in layer.matrices}
    named = [f"{n} ({percent(e)} of its output lost)" for n, e in lost.items() if e is not None and e >= SENSITIVE]
    if not named:
        return None
    return (
        f"Too sensitive for this budget: {', '.join(named)}. Fine-tuning has to make up for that; a larger budget "
        f"would help there first."
    )


def left(layers: Mapping[str, str]) -> list[str]:
    """A sentence for each recurrent layer that stays as it was, given why, by name."""
    return [f"{name or 'The recurrent layer'} stays dense: {reason.rstrip('.')}." for name, reason in layers.items()]


def elsewhere(recurrent: int, model: int) -> str | None:
    """Says how much of a model is not in its recurrent layers; None where it is less than half."""
    rest = model - recurrent
    if rest < model / 2:
        return None
    part = percent(rest / model)
    return (
        f"{part} of the model's {count(model)} numbers stand outside of these recurrent layers and stay as they are: "
        f"however small the layers become, the model keeps at least {part} of its numbers."
    )


def notes(report: Report) -> list[str]:
    """What a reader should know beside the numbers."""
    found = [
        *left(report.left),
        elsewhere(report.totals.parameters_before, report.totals.model_parameters_before),
        sensitive(report),
        NOT_LOOKED_AT if report.quality.metric is None else None,
    ]
    return [note for note in found if note is not None]


PAIRED = ("paired", "tt", "tr", "bt")
"""Layouts whose modes take rows and columns together."""

SENSITIVE = 0.5
"""The relative error of a matrix's output from which on it is named."""

NOT_LOOKED_AT = (
    "Accuracy was not looked at: without a task there is no data to measure, weigh or fine-tune on. "
    "Weights of trained RNNs alone say little about what a model does; give --task before you rely on it."
)

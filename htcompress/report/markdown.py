"""The report in Markdown, short enough for a pull-request comment."""

from __future__ import annotations

import re
from collections.abc import Callable

from htcompress.report import words
from htcompress.report.report import Report


def to_markdown(report: Report) -> str:
    """The report as Markdown text."""
    t, q = report.totals, report.quality
    lines = [
        f"# {report.source['file']}: {words.count(t.parameters_before)} to {words.count(t.parameters_after)} "
        f"RNN parameters",
        "",
        "| | dense | compressed | |",
        "|---|---:|---:|---:|",
        _row("RNN parameters", words.count, t.parameters_before, t.parameters_after),
        _row("RNN size", words.size, t.bytes_before, t.bytes_after),
        _row("multiplications per step", words.count, t.macs_per_step_before, t.macs_per_step_after),
        _row("model parameters", words.count, t.model_parameters_before, t.model_parameters_after),
    ]
    if q.metric is not None:
        lines.append(f"| **{q.metric}** | {words.metric(q.dense)} | **{words.metric(q.final)}** | {words.change(q)} |")
        if q.finetuned is not None and q.decomposed is not None:
            lines += ["", f"Before fine-tuning: {q.metric} {words.metric(q.decomposed)}."]
    else:
        lines += ["", words.NOT_LOOKED_AT]
    lines += [
        "",
        "| matrix | shape | modes (rows \\| columns) | rank | numbers | weights lost | output lost |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for layer in report.layers:
        for m in layer.matrices:
            shape = f"{m.shape[0]} x {m.shape[1]}"
            lines.append(
                f"| {m.name} | {shape} | {words.form(m).replace('|', chr(92) + '|')} | {words.rank(m)} | "
                f"{words.count(m.parameters)} | {words.percent(m.error['weights'])} | "
                f"{words.percent(m.error['outputs'])} |"
            )
    for note in (*words.left(report.left), words.sensitive(report)):
        if note is not None:
            lines += ["", note]
    lines += ["", f"htcompress {report.version}, seed {report.seed}.", ""]
    return "\n".join(lines)


def _row(name: str, write: Callable[[int], str], before: int, after: int) -> str:
    return f"| {name} | {write(before)} | {write(after)} | {words.ratio(before, after)} |"


def model_card(report: Report) -> str:
    """The README.md of an output directory: what the model is and how to load it."""
    t, q = report.totals, report.quality
    quality = "Its accuracy was not measured."
    if q.metric is not None and q.final is not None:
        quality = f"{q.metric}: {words.metric(q.final)} (dense model: {words.metric(q.dense)})."
    digest = report.source["sha256"]
    source = f"`{report.source['file']}`" + (f" (sha256 `{digest}`)" if digest else "")
    reordered = [layer.name or "the model" for layer in report.layers if layer.units_reordered]
    order = ""
    if reordered:
        order = (
            f"\nThe hidden units of {', '.join(reordered)} stand in another order than in the original, and so do the "
            f"weights that read them:\ntake all tensors from here.\n"
        )
    graph = _GRAPHS.get(report.source.get("format") or "")
    before = f"{words.count(t.parameters_before)} ({words.size(t.bytes_before)})"
    after = f"{words.count(t.parameters_after)} numbers ({words.size(t.bytes_after)})"
    return f"""{_front_matter(report)}# {report.source["file"]}, compressed

The recurrent layers of this model are stored in Hierarchical Tucker form:
{after} in place of {before},
{words.ratio(t.bytes_before, t.bytes_after)}. {quality}

{graph or _LOAD}
- `model.safetensors`: every tensor of {"the recurrent layers" if graph else "the model"}
- `config.json`: the layers' settings, layouts, trees and ranks
- `report.html`, `report.md`, `report.json`: what was spent and lost in each layer
{order}
Compressed from {source} by htcompress {report.version}.
"""


_LOAD = """\
Load it into an instance of the original class; its recurrent modules are replaced:

    import htcompress
    model = htcompress.load("path/to/this/directory", OriginalModel())
"""

_GRAPHS = {
    "onnx": """\
`model.onnx` takes and gives what the original does, under the same names; run it as that:

    import onnxruntime
    session = onnxruntime.InferenceSession("path/to/this/directory/model.onnx")
""",
    "keras": """\
`model.keras` or `model.h5` is the original file with the compressed layers' matrices written out, as large as before:

    import keras
    model = keras.saving.load_model("path/to/this/directory/model.keras")

The compressed layers themselves are in `model.safetensors`, each as a module of torch.
""",
}
"""How a model that runs from its own file is loaded, by its format."""


def _front_matter(report: Report) -> str:
    """What model hubs read of a card."""
    kinds = dict.fromkeys(layer.kind.partition("_")[0] for layer in report.layers)
    tags = ["htcompress", "hierarchical-tucker", "model-compression", *kinds]
    format = report.source.get("format") or ""
    library = format if format in _GRAPHS else "htcompress"
    lines = [f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags)]
    if report.quality.metric is not None and re.fullmatch(r"[\w-]+", report.quality.metric):
        lines += ["metrics:", f"- {report.quality.metric}"]
    return "\n".join(["---", *lines, "---", "", ""])

"""The report of a compression: one object; JSON, Markdown and the terminal's are views of it.

It knows nothing of torch: whoever only reads a report need not wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from htcompress.errors import CheckpointError, RequestError
from htcompress.report.schema import MOST, Count, decoded, shown
from htcompress.request import Request
from htcompress.vocabulary import Kind

SCHEMA = "htcompress.report/1"
MOST_BYTES = 1 << 26
"""The size that a report.json may have."""

_MOST_LEAVES = 64


RequestValue = str | int | float | bool | None | dict[str, str | int | float | bool | None]
"""What stands in the `request` of a report; see `htcompress.request.Request.to_report`."""


@dataclass(frozen=True)
class Totals:
    """Sums over the recurrent layers that were compressed; `model_*` over the whole model.

    Parameters count stored numbers, biases included (before: as the checkpoint stores them, both biases of
    each layer). Bytes are those of the same tensors. MACs are multiplications for one time step of one
    sequence. The ratio is before / after.
    """

    parameters_before: Count
    parameters_after: Count
    ratio: float
    bytes_before: Count
    bytes_after: Count
    macs_per_step_before: Count
    macs_per_step_after: Count
    model_parameters_before: Count
    model_parameters_after: Count


@dataclass(frozen=True)
class MatrixReport:
    """One weight matrix: how it is stored, and the relative errors of the decomposition.

    `error` has `weights` (||W - W'|| / ||W||) and `outputs` (the same weighted by data and gradients; None
    without calibration). Both are 0 where the matrix is kept dense. `spectrum` has the leading singular values of
    the matrix in its metric, divided by the largest; None where they were not found. `bytes` is what its cores take,
    `codec` how they are stored.
    """

    name: str
    shape: tuple[Count, Count]
    layout: str
    row_modes: tuple[Count, ...]
    col_modes: tuple[Count, ...]
    tree: Any
    ranks: dict[str, Count]
    parameters: Count
    error: dict[str, float | None]
    kept_dense: bool
    spectrum: tuple[float, ...] | None = None
    bytes: Count | None = None
    codec: dict[str, str | int] | None = None


@dataclass(frozen=True)
class LayerReport:
    """One recurrent layer; `scope` is None where all of it is kept dense, `mixed` where directions differ.

    `units_reordered`: its hidden units stand in another order than in the checkpoint, and the modules that read
    them are stored accordingly.
    """

    name: str
    kind: str
    settings: dict[str, str | int | float | bool]
    parameters_before: Count
    parameters_after: Count
    scope: str | None
    matrices: tuple[MatrixReport, ...]
    units_reordered: bool = False


@dataclass(frozen=True)
class Quality:
    """The task's headline metric at each stage, None where not measured; `metrics` has all of them."""

    metric: str | None = None
    higher_is_better: bool = True
    dense: float | None = None
    decomposed: float | None = None
    finetuned: float | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def final(self) -> float | None:
        """The metric of the model as it was written."""
        return self.finetuned if self.finetuned is not None else self.decomposed

    def with_stage(self, stage: str, metrics: Mapping[str, float], *, higher_is_better: bool) -> Quality:
        """The quality with one more stage measured: `dense`, `decomposed` or `finetuned`."""
        headline = next(iter(metrics))
        # Values of another metric do not compare.
        known = self if self.metric in (None, headline) else Quality()
        values = {name: getattr(known, name) for name in ("dense", "decomposed", "finetuned")}
        values[stage] = metrics[headline]
        return Quality(headline, higher_is_better, **values, metrics={**known.metrics, stage: dict(metrics)})


@dataclass(frozen=True)
class Timings:
    """Seconds of each stage, None where it did not run."""

    statistics: float | None = None
    decompose: float | None = None
    finetune: float | None = None
    evaluate: float | None = None


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call of the whole model, dense and as it was written; `of` says on what."""

    dense_ms: float
    compressed_ms: float
    of: str


@dataclass(frozen=True)
class Report:
    """What was asked, what came of it, and how well it works.

    `frontier` has pairs of stored numbers and the relative output error that the plan expects there, up to the
    budget; `latency` is None where there was nothing to call the model with; `left` names the recurrent layers that
    stay as they were, and why.
    """

    version: str
    source: dict[str, str | None]
    seed: int
    request: dict[str, RequestValue]
    totals: Totals
    layers: tuple[LayerReport, ...]
    quality: Quality
    timings_s: Timings
    frontier: tuple[tuple[Count, float], ...] = ()
    latency: Latency | None = None
    left: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMA

    def to_json(self) -> str:
        """The report as JSON text (schema `htcompress.report/1`)."""
        return json.dumps({"schema": self.schema, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "report.json") -> Report:
        """The inverse of `to_json`. Raises `CheckpointError` where the text is no such report."""
        try:
            report = decoded(cls, text, SCHEMA)
            _sensible(report)
        except CheckpointError as error:
            raise CheckpointError(f"{source} {error} Convert the model again.") from error
        except (ValueError, KeyError, TypeError, RequestError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{source} is not a report of htcompress: {what}. Convert the model again."
            ) from error
        return report


def read_report(place: str | Path) -> Report:
    """The report of an output directory, or of a report.json.

    Raises `CheckpointError` where there is none, or it cannot be read.
    """
    path = report_file(place)
    if not path.is_file():
        missing = f"{place} has no report.json" if Path(place).is_dir() else f"{place} is not there"
        raise CheckpointError(f"{missing}. Give an output directory that htcompress convert has written.")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than a report ever has")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Convert the model again.") from error
    return Report.from_json(text, source=str(path))


def report_file(place: str | Path) -> Path:
    """The report.json of an output directory; any other place is one itself."""
    path = Path(place)
    return path / "report.json" if path.is_dir() else path


def _sensible(report: Report) -> None:
    """Raise `ValueError`, `KeyError` or `TypeError` where values are of the right types, but not what views show."""
    t, latency = report.totals, report.latency
    for what in ("parameters", "bytes", "macs_per_step", "model_parameters"):
        if getattr(t, f"{what}_after") and not getattr(t, f"{what}_before"):
            raise ValueError(f"{what}_before is 0, and {what}_after is not")
    for key in ("file", "sha256"):
        _one_of(report.source[key], (str,) if key == "file" else (str, type(None)), key)
    _one_of(report.source.get("path"), (str, type(None)), "path")
    goals = [report.request.get(goal) for goal in ("budget", "error", "ratio", "bytes")]
    for goal in (*goals, report.request.get("time_limit")):
        _one_of(goal, (int, float, type(None)), "a goal of the request")
        if isinstance(goal, int | float) and not abs(goal) <= MOST:
            raise ValueError(f"a goal of the request is {shown(goal)}, more than anything that is counted")
    if all(goal is None for goal in goals):
        raise ValueError("its request has no goal: neither budget, error nor ratio, nor bytes")
    Request.of_report(report.request, seed=report.seed)
    if latency is not None and min(latency.dense_ms, latency.compressed_ms) <= 0:
        raise ValueError("a latency is not above 0")
    if any(not 0 <= error <= 1e9 for _, error in report.frontier) or any(n < 1 for n, _ in report.frontier):
        raise ValueError("a point of its frontier has no numbers, or an error that none is")
    for layer in report.layers:
        _sensible_settings(layer.settings)
        for matrix in layer.matrices:
            _sensible_matrix(matrix)


def _sensible_settings(settings: Mapping[str, Any]) -> None:
    if settings["kind"] not in list(Kind):
        raise ValueError(f"a layer is of kind {shown(settings['kind'])}; expected one of {', '.join(Kind)}")
    for key in ("input_size", "hidden_size", "num_layers", "proj_size"):
        if type(settings[key]) is not int or not 0 <= settings[key] <= MOST:
            raise ValueError(f"{key} is {shown(settings[key])}; expected a whole number")
    for key in ("cell", "bidirectional"):
        _one_of(settings[key], (bool,), key)


def _sensible_matrix(matrix: MatrixReport) -> None:
    for key in ("weights", "outputs"):
        _one_of(matrix.error[key], (int, float, type(None)), f"the error of {key}")
    if matrix.layout == "dense":
        return
    if not matrix.ranks:
        raise ValueError(f"{matrix.name} has no ranks")
    if len(matrix.row_modes) != len(matrix.col_modes) or len(matrix.row_modes) > _MOST_LEAVES:
        raise ValueError(
            f"{matrix.name} has {len(matrix.row_modes)} row modes and {len(matrix.col_modes)} column modes"
        )
    if matrix.spectrum is not None and any(not 0 <= value <= 1e9 for value in matrix.spectrum):
        raise ValueError(f"the spectrum of {matrix.name} has values below 0 or beyond measure")
    leaves: list[int] = []
    stack = [matrix.tree] if matrix.tree != [] else []
    while stack:
        part = stack.pop()
        if isinstance(part, list) and len(part) > 1:
            stack += part
        elif type(part) is int and 0 <= part < len(matrix.row_modes) and part not in leaves:
            leaves.append(part)
        else:
            raise ValueError(f"the tree of {matrix.name} has {shown(part)} where it has two parts or a leaf")


def _one_of(value: Any, kinds: tuple[type, ...], name: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TypeError(f"{name} is {shown(value)}; expected {expected}")

"""The report of a compression: one object; JSON, Markdown and the terminal's are views of it.

It knows nothing of torch: whoever only reads a report need not wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from htcompress.errors import CheckpointError

SCHEMA = "htcompress.report/1"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Totals:
    """Sums over the recurrent layers that were compressed; `model_*` over the whole model.

    Parameters count stored numbers, biases included (before: as the checkpoint stores them, both biases of
    each layer). Bytes are those of the same tensors. MACs are multiplications for one time step of one
    sequence. The ratio is before / after.
    """

    parameters_before: int
    parameters_after: int
    ratio: float
    bytes_before: int
    bytes_after: int
    macs_per_step_before: int
    macs_per_step_after: int
    model_parameters_before: int
    model_parameters_after: int


@dataclass(frozen=True)
class MatrixReport:
    """One weight matrix: how it is stored, and the relative errors of the decomposition.

    `error` has `weights` (||W - W'|| / ||W||) and `outputs` (the same weighted by data and gradients; None
    without calibration). Both are 0 where the matrix is kept dense. `spectrum` has the leading singular values of
    the matrix in its metric, divided by the largest; None where they were not found.
    """

    name: str
    shape: tuple[int, int]
    layout: str
    row_modes: tuple[int, ...]
    col_modes: tuple[int, ...]
    tree: Any
    ranks: dict[str, int]
    parameters: int
    error: dict[str, float | None]
    kept_dense: bool
    spectrum: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LayerReport:
    """One recurrent layer; `scope` is None where all of it is kept dense, `mixed` where slots differ.

    `units_reordered`: its hidden units stand in another order than in the checkpoint, and the modules that read
    them are stored accordingly.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    parameters_before: int
    parameters_after: int
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
    budget; `latency` is None where there was nothing to call the model with.
    """

    version: str
    source: dict[str, Any]
    seed: int
    request: dict[str, Any]
    totals: Totals
    layers: tuple[LayerReport, ...]
    quality: Quality
    timings_s: Timings
    frontier: tuple[tuple[int, float], ...] = ()
    latency: Latency | None = None
    schema: str = SCHEMA

    def to_json(self) -> str:
        """The report as JSON text (schema `htcompress.report/1`)."""
        return json.dumps({"schema": self.schema, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "report.json") -> Report:
        """The inverse of `to_json`. Raises `CheckpointError` where the text is no such report."""
        try:
            data = json.loads(text, parse_constant=_no_number)
            if data.get("schema") != SCHEMA:
                raise CheckpointError(
                    f"{source} has the schema {data.get('schema')!r}; expected {SCHEMA!r}. Convert the model again."
                )
            layers = tuple(
                _typed(LayerReport, {**layer, "matrices": tuple(_matrix(m) for m in layer["matrices"])})
                for layer in data["layers"]
            )
            parts = {
                "totals": _typed(Totals, data["totals"]),
                "layers": layers,
                "quality": _typed(Quality, data["quality"]),
                "timings_s": _typed(Timings, data["timings_s"]),
                "frontier": tuple((int(numbers), float(error)) for numbers, error in data.get("frontier", ())),
                "latency": None if data.get("latency") is None else _typed(Latency, data["latency"]),
            }
            report = _typed(cls, {**data, **parts})
            _ = report.source["file"], report.source["sha256"]
            return report
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{source} is not a report of htcompress: {what}. Convert the model again."
            ) from error


def read_report(place: str | Path) -> Report:
    """The report of an output directory, or of a report.json.

    Raises `CheckpointError` where there is none, or it cannot be read.
    """
    path = report_file(place)
    if not path.is_file():
        missing = f"{place} has no report.json" if Path(place).is_dir() else f"{place} is not there"
        raise CheckpointError(f"{missing}. Give an output directory that htcompress convert has written.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Convert the model again.") from error
    return Report.from_json(text, source=str(path))


def report_file(place: str | Path) -> Path:
    """The report.json of an output directory; any other place is one itself."""
    path = Path(place)
    return path / "report.json" if path.is_dir() else path


def _no_number(text: str) -> float:
    raise ValueError(f"it has {text} where JSON has numbers or null")


def _matrix(data: dict[str, Any]) -> MatrixReport:
    lists = {name: tuple(data[name]) for name in ("shape", "row_modes", "col_modes")}
    if data.get("spectrum") is not None:
        lists["spectrum"] = tuple(float(value) for value in data["spectrum"])
    for name in ("weights", "outputs"):
        error = data["error"][name]
        if isinstance(error, bool) or not isinstance(error, (int, float, NoneType)):
            raise TypeError(f"the error of {name} is {json.dumps(error)}; expected float or null")
    return _typed(MatrixReport, {**data, **lists})


def _typed(cls: type[Made], data: dict[str, Any]) -> Made:
    """A dataclass from JSON values. Raises `TypeError` where one is not of its field's type."""
    hints = get_type_hints(cls)
    for name, value in data.items():
        kind = hints.get(name, Any)
        allowed = tuple(get_origin(k) or k for k in (get_args(kind) if get_origin(kind) is UnionType else (kind,)))
        # JSON does not part 1 from 1.0.
        fits = Any in allowed or isinstance(value, (*allowed, int) if float in allowed else allowed)
        if not fits or (isinstance(value, bool) and bool not in allowed):
            expected = " or ".join("null" if k is NoneType else k.__name__ for k in allowed)
            raise TypeError(f"{name} is {json.dumps(value)}; expected {expected}")
    return cls(**data)

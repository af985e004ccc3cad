"""What a study asks of each compression, and what came of it; one object, of which the views are views."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from htcompress.errors import CheckpointError
from htcompress.report.report import Report, RequestValue
from htcompress.report.schema import decoded, shown
from htcompress.request import Goal
from htcompress.vocabulary import WIDEST, Format, Scope

SCHEMA = "htcompress.study/1"
KINDS = ("sweep", "compare")

ROUNDED = (8, 4, 3, 2)
"""Bits in which a comparison rounds the dense matrices."""


@dataclass(frozen=True)
class Case:
    """One compression that a study asks for: a format, and how small or how exact.

    Attributes:
        budget: of numbers.
        error: relative, of each weight matrix.
        bytes: a budget of bytes.
        bits: of each number; without a budget and an error, all numbers in so many.
    """

    format: str
    budget: int | None = None
    error: float | None = None
    bytes: int | None = None
    bits: int | None = None

    def goal(self, scope: Scope) -> Goal:
        """What it asks of a compression. Raises `RequestError` where that makes no sense."""
        alone = self.budget is None and self.error is None and self.bytes is None
        return Goal(
            self.budget,
            self.error,
            1.0 if alone else None,
            scope=scope,
            format=Format(self.format),
            bits=self.bits,
            bytes=self.bytes,
        )

    @property
    def name(self) -> str:
        """Of its output directory within the study's: `ht-5000`, `svd-error-0.1`, `ht-20000B`, `dense-4bits`."""
        words = [self.format]
        words += [f"{self.budget}"] if self.budget is not None else []
        words += [f"error-{self.error:g}"] if self.error is not None else []
        words += [f"{self.bytes}B"] if self.bytes is not None else []
        words += [f"{self.bits}bits"] if self.bits is not None else []
        return "-".join(words)


@dataclass(frozen=True)
class Point:
    """What came of a case; None where it was not measured.

    Attributes:
        parameters: stored numbers of the recurrent layers; None where the budget cannot be reached.
        least: the smallest budget that can be, where this one cannot.
        output_error: the largest relative error that the decomposition makes in what a matrix puts out, on the
            calibration data.
        decomposed, finetuned: the headline metric before and after fine-tuning.
        latency_ms: of one call of the whole model, milliseconds.
        seconds: from the checkpoint to the evaluated model.
    """

    case: Case
    parameters: int | None = None
    ratio: float | None = None
    bytes: int | None = None
    output_error: float | None = None
    decomposed: float | None = None
    finetuned: float | None = None
    latency_ms: float | None = None
    seconds: float | None = None
    least: int | None = None

    @property
    def final(self) -> float | None:
        """The metric of the model as it was written."""
        return self.decomposed if self.finetuned is None else self.finetuned

    @classmethod
    def of(cls, case: Case, report: Report) -> Point:
        """The point that a report describes."""
        lost = [m.error["outputs"] for layer in report.layers for m in layer.matrices if not m.kept_dense]
        known = [error for error in lost if error is not None]
        spent = [seconds for seconds in vars(report.timings_s).values() if seconds is not None]
        return cls(
            case,
            report.totals.parameters_after,
            report.totals.ratio,
            report.totals.bytes_after,
            max(known) if known and len(known) == len(lost) else None,
            report.quality.decomposed,
            report.quality.finetuned,
            seconds=round(sum(spent), 1),
        )


@dataclass(frozen=True)
class Dense:
    """The model that all points start from."""

    parameters: int
    bytes: int
    metric: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Study:
    """A finished sweep or comparison.

    Attributes:
        kind: `sweep` or `compare`.
        request: what was asked for beside the cases: task, layers, scope, seed, steps or epochs of fine-tuning.
        metric: the name of the headline metric; None without one.
        latency: what the latencies are of: batch and threads.
    """

    kind: str
    version: str
    source: dict[str, str | None]
    request: dict[str, RequestValue]
    metric: str | None
    higher_is_better: bool
    latency: str | None
    dense: Dense
    points: tuple[Point, ...]
    schema: str = SCHEMA

    def best_first(self) -> list[Point]:
        """The points by their final metric, best first; unmeasured ones last."""

        def key(point: Point) -> tuple[bool, float]:
            if point.final is None:
                return True, 0.0
            return False, -point.final if self.higher_is_better else point.final

        return sorted(self.points, key=key)

    def to_json(self) -> str:
        """The study as JSON text (schema `htcompress.study/1`)."""
        return json.dumps({"schema": self.schema, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "study.json") -> Study:
        """The inverse of `to_json`. Raises `CheckpointError` where the text is no such study."""
        try:
            study = decoded(cls, text, SCHEMA)
        except CheckpointError as error:
            raise CheckpointError(f"{source} {error} Run it again.") from error
        except ValueError as error:
            raise CheckpointError(f"{source} is not a study of htcompress: {error}. Run it again.") from error
        wrong = _wrong(study)
        if wrong is not None:
            raise CheckpointError(f"{source} is not a study of htcompress: {wrong}. Run it again.")
        return study


def _wrong(study: Study) -> str | None:
    """What views cannot show of a study whose values are of the right types; None where there is nothing."""
    if study.kind not in KINDS:
        return f"its kind is {shown(study.kind)}; expected one of {', '.join(KINDS)}"
    if type(study.request.get("seed")) is not int or type(study.request.get("steps", "")) not in (int, type(None)):
        return "its request has no whole number of steps, or no seed"
    if not study.source.get("file"):
        return "its source has no file"
    if any(point.parameters is None and point.least is None for point in study.points):
        return "a point has neither stored numbers nor the least that could be"
    if any(
        {point.case.budget, point.case.error, point.case.bytes, point.case.bits} == {None} for point in study.points
    ):
        return "a case has neither a budget nor an error"
    return None


def cases(
    formats: Sequence[str], *, budgets: Sequence[int] = (), errors: Sequence[float] = (), bytes: Sequence[int] = ()
) -> list[Case]:
    """Every format at every budget and error, each once, in order.

    Beside budgets of bytes HT has a row without rounding. Dense matrices that are rounded have no size to be chosen
    but by their bits: they have a row for each of `ROUNDED`.
    """
    found: list[Case] = []
    for form in formats:
        rounds = form == Format.DENSE
        found += [] if rounds else [Case(form, budget=b) for b in budgets]
        found += [Case(form, bytes=b) for b in bytes]
        found += [Case(form, bytes=b, bits=WIDEST) for b in bytes if form == Format.HT]
        found += [Case(form, bits=bits) for bits in ROUNDED if rounds]
    found += [Case(form, error=e) for form in formats if form != Format.DENSE for e in errors]
    return list(dict.fromkeys(found))

"""The report as an object and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from schema import check_report

from htcompress import Compressed
from htcompress.errors import CheckpointError, RequestError
from htcompress.report import Quality, Report, Timings


def test_json_and_back(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report
    check_report(json.loads(report.to_json()))


def test_a_real_report_and_back(compressed: Compressed) -> None:
    report = compressed.report
    assert Report.from_json(report.to_json()) == report
    check_report(json.loads(report.to_json()))


def test_the_schema_comes_first_and_the_text_ends_a_line(report: Report) -> None:
    text = report.to_json()
    assert text.startswith('{\n  "schema": "htcompress.report/1"')
    assert text.endswith("}\n")
    assert text.isascii()


def test_what_was_not_measured_is_null(report: Report) -> None:
    bare = replace(report, quality=Quality(), timings_s=Timings(decompose=1.0))
    data = json.loads(bare.to_json())
    assert data["quality"] == {
        "metric": None,
        "higher_is_better": True,
        "dense": None,
        "decomposed": None,
        "finetuned": None,
        "metrics": {},
    }
    assert data["timings_s"] == {"statistics": None, "decompose": 1.0, "finetune": None, "evaluate": None}
    assert Report.from_json(bare.to_json()) == bare
    check_report(data)


def test_no_number_that_json_does_not_know_is_written(report: Report) -> None:
    broken = replace(report, timings_s=Timings(decompose=math.nan))
    with pytest.raises(ValueError, match="JSON"):
        broken.to_json()


def test_the_final_metric() -> None:
    quality = Quality()
    assert quality.final is None
    quality = quality.with_stage("decomposed", {"eer": 0.3}, higher_is_better=False)
    assert (quality.final, quality.metric, quality.higher_is_better) == (0.3, "eer", False)
    quality = quality.with_stage("finetuned", {"eer": 0.0}, higher_is_better=False)
    assert quality.final == 0.0
    assert quality.metrics == {"decomposed": {"eer": 0.3}, "finetuned": {"eer": 0.0}}


def test_values_of_another_metric_are_dropped() -> None:
    quality = Quality().with_stage("dense", {"accuracy": 0.9}, higher_is_better=True)
    other = quality.with_stage("finetuned", {"loss": 0.1, "accuracy": 0.8}, higher_is_better=False)
    assert (other.metric, other.dense, other.finetuned) == ("loss", None, 0.1)


def changed(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> Any:
        at: Any = data
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        return data

    return change


def lacking(*keys: str | int) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> Any:
        at: Any = data
        for key in keys[:-1]:
            at = at[key]
        del at[keys[-1]]
        return data

    return change


MATRIX = ("layers", 0, "matrices", 0)
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda data: [data], "is not a report of htcompress"),
    "a number": (lambda data: 3, "is not a report of htcompress"),
    "null": (lambda data: None, "is not a report of htcompress"),
    "foreign": (
        lambda data: {"name": "package", "version": "1"},
        "has the schema null; expected 'htcompress.report/1'",
    ),
    "later schema": (changed("schema", value="htcompress.report/2"), 'has the schema "htcompress.report/2"; expected'),
    **{
        f"no {name}": (lacking(name), "is not a report")
        for name in ("version", "totals", "layers", "quality", "source")
    },
    "no file": (lacking("source", "file"), "it lacks 'file'"),
    "no sha256": (lacking("source", "sha256"), "it lacks 'sha256'"),
    "no parameters": (lacking("totals", "parameters_after"), "totals: it lacks parameters_after"),
    "text for a number": (
        changed("totals", "parameters_after", value="15080"),
        "totals.parameters_after: expected int, got str",
    ),
    "a part of a number": (
        changed("totals", "parameters_after", value=0.5),
        "totals.parameters_after: expected int, got float",
    ),
    "true for a number": (changed("totals", "ratio", value=True), "totals.ratio: expected float, got bool"),
    "null for a number": (changed("seed", value=None), "seed: expected int, got null"),
    "text for a metric": (changed("quality", "dense", value="good"), "quality.dense: expected float | null, got str"),
    "layers a number": (changed("layers", value=3), "is not a report"),
    "no matrices": (lacking("layers", 0, "matrices"), "it lacks matrices"),
    "no shape": (lacking(*MATRIX, "shape"), "it lacks shape"),
    "shape a number": (changed(*MATRIX, "shape", value=3), "is not a report"),
    "ranks a list": (changed(*MATRIX, "ranks", value=[1]), "ranks: expected object, got array"),
    "timings a list": (changed("timings_s", value=[]), "is not a report"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_json_that_is_no_report(report: Report, case: str) -> None:
    change, words = BROKEN[case]
    with pytest.raises(CheckpointError) as caught:
        Report.from_json(json.dumps(change(json.loads(report.to_json()))), source="out/report.json")
    message = str(caught.value)
    assert message.startswith("out/report.json ")
    assert words in message
    assert message.endswith("Convert the model again.")


def test_fields_of_later_versions_are_passed_over(report: Report) -> None:
    later = changed("totals", "colour", value=1)(json.loads(report.to_json()))
    assert Report.from_json(json.dumps(later)) == report


@pytest.mark.parametrize("text", ["", "{", "no json", "[" * 100_000, '{"schema": "htcompress.report/1"}', "\0"])
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"report.json .*Convert the model again"):
        Report.from_json(text)


def test_whole_numbers_may_stand_for_real_ones(report: Report) -> None:
    # Other writers of JSON drop the point.
    data = json.loads(report.to_json())
    data["quality"]["dense"], data["timings_s"]["decompose"], data["totals"]["ratio"] = 1, 2, 3963
    again = Report.from_json(json.dumps(data))
    assert (again.quality.dense, again.timings_s.decompose, again.totals.ratio) == (1, 2, 3963)


def test_messages_repeat_no_name_without_end() -> None:
    for error in (CheckpointError("x" * 10_000 + " is no layer."), RequestError("found " + "y" * 5000)):
        assert len(str(error)) < 200
    assert str(CheckpointError("A sentence " * 300)) == "A sentence " * 300

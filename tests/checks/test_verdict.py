"""Reports held against limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_report import sample_report

import htcompress
from htcompress.checks import RULES, Verdict, exit_code, judge, parse_limit
from htcompress.checks.config import Target
from htcompress.errors import CheckpointError, RequestError
from htcompress.report import Quality, Report


def write(report: Report, path: Path) -> Path:
    path.write_text(report.to_json(), encoding="utf-8")
    return path


def quality(**stages: float) -> Quality:
    found = Quality()
    better = stages.pop("higher_is_better", True)
    for stage, value in stages.items():
        found = found.with_stage(stage, {"metric": value}, higher_is_better=bool(better))
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(sample_report(), tmp_path / "report.json")


# The sample: 15,080 of 59,775,272 numbers, 60,320 bytes, 965,248 multiplications, accuracy 0.9375 and 0.965, largest
# output error 0.5.
@pytest.mark.parametrize(
    ("name", "holds", "fails", "miss"),
    [
        ("max_parameters", 15_080, 15_079, 1),
        ("min_ratio", 3963.9, 4000, 36.1),
        ("max_bytes", 60_320, 60_000, 320),
        ("max_macs", 965_248, 965_000, 248),
        ("min_metric", 0.965, 0.97, 0.005),
        ("max_drop", -0.0275, -0.03, 0.0025),
        ("max_output_error", 0.5, 0.25, 0.25),
    ],
)
def test_each_limit_at_its_edge(path: Path, name: str, holds: float, fails: float, miss: float) -> None:
    assert htcompress.check(path, **{name: holds}).passed
    verdict = htcompress.check(path, **{name: fails})
    (failure,) = verdict.failures
    assert not verdict.passed
    assert failure.miss == pytest.approx(miss, rel=1e-6)
    assert failure.advice.endswith(".")
    assert (failure.found, failure.bound) == (pytest.approx(holds), fails)


def test_every_rule_has_its_edge_tested() -> None:
    marks = [mark.args[1] for mark in (*test_each_limit_at_its_edge.pytestmark, *test_changes.pytestmark)]
    tested = {case[0] for cases in marks for case in cases}
    assert tested | {"max_metric"} == set(RULES)


def test_lower_is_better(tmp_path: Path) -> None:
    report = replace(sample_report(), quality=quality(dense=2.0, decomposed=2.5, higher_is_better=False))
    path = write(report, tmp_path / "report.json")
    assert htcompress.check(path, max_metric=2.5, max_drop=0.5).passed
    verdict = htcompress.check(path, max_metric=2.4, max_drop=0.4)
    assert [failure.limit.rule.name for failure in verdict.failures] == ["max_metric", "max_drop"]
    assert "was not fine-tuned" in verdict.failures[0].advice
    with pytest.raises(RequestError, match="use max_metric"):
        htcompress.check(path, min_metric=2.0)


# Against a baseline of 14,000 numbers, 56,000 bytes, 900,000 multiplications, accuracy 0.97, output error 0.4.
@pytest.mark.parametrize(
    ("name", "holds", "fails", "bound"),
    [
        ("max_parameters_change", 1080, 1079, 15_079),
        ("max_parameters_change", "8%", "7%", 14_980),
        ("max_bytes_change", 4320, "5%", 58_800),
        ("max_macs_change", "8%", "1k", 901_000),
        ("max_metric_change", 0.005, 0.004, 0.966),
        ("max_metric_change", "1%", "0.1%", 0.96903),
        ("max_output_error_change", 0.1, 0.05, 0.45),
        ("max_output_error_change", "25%", "20%", 0.48),
    ],
)
def test_changes(path: Path, tmp_path: Path, name: str, holds: float | str, fails: float | str, bound: float) -> None:
    report = sample_report()
    totals = replace(report.totals, parameters_after=14_000, bytes_after=56_000, macs_per_step_after=900_000)
    layer = report.layers[0]
    matrices = tuple(replace(m, error={"weights": 1.0, "outputs": 0.4}) for m in layer.matrices)
    earlier = replace(
        report, totals=totals, layers=(replace(layer, matrices=matrices),), quality=quality(finetuned=0.97)
    )
    earlier = replace(earlier, quality=replace(earlier.quality, metric="accuracy"))
    baseline = write(earlier, tmp_path / "baseline.json")
    assert htcompress.check(path, baseline=baseline, **{name: holds}).passed
    (failure,) = htcompress.check(path, baseline=baseline, **{name: fails}).failures
    assert failure.bound == pytest.approx(bound)
    # What is better than the baseline passes.
    assert htcompress.check(baseline, baseline=path, **{name: 0}).passed


def test_rounding_is_no_failure(tmp_path: Path) -> None:
    report = replace(sample_report(), quality=quality(dense=0.95, decomposed=0.94))
    assert report.quality.dense - report.quality.decomposed > 0.01  # type: ignore[operator]
    assert htcompress.check(write(report, tmp_path / "r.json"), max_drop=0.01).passed


def test_failures_come_first(path: Path) -> None:
    verdict = htcompress.check(path, max_bytes="1m", max_parameters=10, min_ratio=2, max_macs=10)
    names = [check.limit.rule.name for check in verdict.checks]
    assert names == ["max_parameters", "max_macs", "max_bytes", "min_ratio"]
    assert exit_code([verdict]) == 1


@pytest.mark.parametrize(
    ("limits", "stages", "words"),
    [
        ({"min_metric": 0.5}, {}, "without a task"),
        ({"max_drop": 0.5}, {}, "without a task"),
        ({"max_drop": 0.5}, {"decomposed": 0.9}, "of the dense model"),
        ({"max_drop": 0.5}, {"dense": 0.9}, "of the compressed model"),
        ({"max_metric": 0.5}, {"dense": 0.9, "decomposed": 0.9}, "use min_metric"),
        ({"max_drop": 5}, {"dense": 0.9, "decomposed": 0.2}, "could not happen"),
    ],
)
def test_what_was_not_measured_never_passes(
    tmp_path: Path, limits: dict[str, Any], stages: dict[str, float], words: str
) -> None:
    path = write(replace(sample_report(), quality=quality(**stages)), tmp_path / "report.json")
    with pytest.raises(RequestError, match=words):
        htcompress.check(path, **limits)


def test_an_unknown_output_error_never_passes(tmp_path: Path) -> None:
    report = sample_report()
    unknown = replace(report.layers[0].matrices[0], error={"weights": 0.1, "outputs": None})
    report = replace(report, layers=(replace(report.layers[0], matrices=(unknown,)),))
    with pytest.raises(RequestError, match=r"output error of encoder\.rnn\.l0"):
        htcompress.check(write(report, tmp_path / "report.json"), max_output_error=0.9)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "true", '"0.9"', "[]"])
def test_a_metric_that_is_no_number_never_passes(path: Path, value: str) -> None:
    data = json.loads(path.read_text())
    data["quality"]["finetuned"] = "HERE"
    path.write_text(json.dumps(data).replace('"HERE"', value))
    with pytest.raises((CheckpointError, RequestError), match=r"report\.json"):
        htcompress.check(path, min_metric=0.1)


def test_a_report_is_no_baseline_of_itself(path: Path) -> None:
    with pytest.raises(RequestError, match="an earlier one"):
        htcompress.check(path, baseline=path.parent, max_parameters_change=5)


def test_a_baseline_with_another_metric(path: Path, tmp_path: Path) -> None:
    other = write(replace(sample_report(), quality=quality(finetuned=0.9)), tmp_path / "old.json")
    with pytest.raises(RequestError, match="do not compare"):
        htcompress.check(path, baseline=other, max_metric_change=0.1)


def test_one_target_with_a_problem_leaves_the_others(path: Path, tmp_path: Path) -> None:
    limits = (parse_limit("max_parameters", 5),)
    verdicts = judge([Target(tmp_path / "gone", limits, name="gone"), Target(path, limits, name="there")])
    assert exit_code(verdicts) == 2
    gone, there = verdicts
    assert isinstance(gone, Verdict)
    assert (gone.checks, len(gone.problems), gone.passed) == ((), 1, False)
    assert len(there.failures) == 1
    assert exit_code([]) == 2

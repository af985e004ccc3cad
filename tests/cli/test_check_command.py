"""check: exit codes, what it writes where, and that no configuration, however odd, lets it pass by accident."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from htcompress_cli import gate
from sample_report import sample_report
from small import Outcome

from htcompress.checks import RULES
from htcompress.report import Quality

Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output directory that has a report, and none of GitHub's variables."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.json").write_text(sample_report().to_json())
    return folder


def test_an_option_for_each_limit() -> None:
    assert [name for name in inspect.signature(gate.check).parameters if name in RULES] == list(RULES)


def test_all_hold(htc: Command) -> None:
    ended = htc("check", "out", "--max-parameters", "16k", "--max-drop", "0.01")
    assert (ended.code, ended.err) == (0, "")
    assert "2 of 2 hold" in ended.out
    assert htc("check", "out/report.json", "--max-parameters", "16k").code == 0


def test_each_failure_is_named(htc: Command) -> None:
    limits = {"max_parameters": "4k", "min_ratio": "4000", "max_bytes": "5k", "max_macs": "5k", "min_metric": "0.99"}
    limits |= {"max_drop": "-0.5", "max_output_error": "0.01"}
    options = [part for name, text in limits.items() for part in ("--" + name.replace("_", "-"), text)]
    ended = htc("check", "out", *options)
    assert (ended.code, ended.err) == (1, "")
    assert "7 of 7 fail" in ended.out
    for name in limits:
        assert f"✗ {name} " in ended.out
    assert "found 15,080, at most 4,000: 11,080 too many" in ended.out
    assert "Convert again with --budget 4000." in ended.out


def test_json_is_alone_on_stdout(htc: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    ended = htc("check", "out", "--max-parameters", "4k", "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["targets"][0]["checks"][0]["miss"] == 11_080
    assert ended.err.startswith("::error title=htcompress check%3A out::max_parameters: ")


def test_junit_and_the_step_summary(htc: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "summary.md").write_text("from another step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert htc("check", "out", "--max-parameters", "4k", "--junit", "found.xml").code == 1
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("from another step\n### ❌ out: 1 of 1 fail\n")
    assert ElementTree.parse(tmp_path / "found.xml").find("testsuite/testcase/failure") is not None


def test_a_summary_that_cannot_be_written_changes_no_verdict(htc: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/nowhere/summary.md")
    ended = htc("check", "out", "--max-parameters", "16k")
    assert ended.code == 0
    assert ended.err.startswith("note: the step summary /nowhere/summary.md cannot be written")


def test_targets(htc: Command, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.htcompress.check]\nmax_drop = 0.01\n"
        '[tool.htcompress.check.large]\nreport = "out"\nmax_parameters = "16k"\n'
        '[tool.htcompress.check.small]\nreport = "out"\nmax_parameters = "4k"\n'
    )
    ended = htc("check")
    assert ended.code == 1
    assert ended.out.index(" small") < ended.out.index(" large")
    assert htc("check", "--target", "large").code == 0
    assert htc("check", "--target", "large", "--target", "small").code == 1
    assert htc("check", "out").code == 0
    assert htc("check", "out", "--target", "small").code == 1
    assert htc("check", "--target", "small", "--max-parameters", "20k").code == 0


def test_a_target_without_a_report_leaves_the_others(htc: Command, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.htcompress.check]\nmax_parameters = 4000\n"
        '[tool.htcompress.check.gone]\nreport = "gone"\n[tool.htcompress.check.there]\nreport = "out"\n'
    )
    ended = htc("check")
    assert ended.code == 2
    assert "✗ max_parameters" in ended.out
    assert ended.err.startswith("htcompress: gone: ")
    assert "Traceback" not in ended.err


CHECK = "[tool.htcompress.check]\n"
TARGET = '[tool.htcompress.check.small]\nreport = "out"\n'
# The configuration, and words of the message.
HOSTILE = {
    "unknown key": (TARGET + "max_paramters = 5000\n", ("max_paramters", "did you mean max_parameters")),
    "unknown key beside targets": (
        CHECK + "maximum = 5\n" + TARGET + "max_parameters = 5\n",
        ("'maximum'", "max_drop"),
    ),
    "unknown key of htcompress": ("[tool.htcompress]\nchecks = 5\n", ("'checks'", "known is check")),
    "limits one table too high": ("[tool.htcompress]\nmax_parameters = 5\n", ("[tool.htcompress]", "'max_parameters'")),
    "option's spelling": (TARGET + "max-parameters = 5000\n", ("'max-parameters'", "did you mean max_parameters")),
    "percentage of a metric": (TARGET + 'max_drop = "5%"\n', ("max_drop", "'5%'", "0.05", "unit of the task's metric")),
    "percentage of an error": (TARGET + 'max_output_error = "5%"\n', ("max_output_error", "Write 0.05")),
    "percentage as a number": (TARGET + "max_output_error = 5\n", ("max_output_error", "Write 0.05 for 5 %")),
    "percentage of a size": (TARGET + 'max_parameters = "5%"\n', ("max_parameters", "not a share")),
    "drop in points": (TARGET + "max_drop = 5\n", ("max_drop", "could not happen to accuracy", "0.01")),
    "part of a size": (TARGET + "max_parameters = 0.05\n", ("max_parameters", "whole number", "0.05")),
    "part of a change": (
        TARGET + 'baseline = "old"\nmax_parameters_change = 0.05\n',
        ("max_parameters_change", "such as '5%'"),
    ),
    "quoted number": (TARGET + 'max_parameters = "5000"\n', ("max_parameters", "without quotes")),
    "text": (TARGET + 'max_parameters = "many"\n', ("max_parameters", "'many'", "whole number")),
    "true": (TARGET + "max_parameters = true\n", ("max_parameters", "True")),
    "list": (TARGET + "max_parameters = [5000]\n", ("max_parameters", "a list")),
    "nan": (TARGET + "min_metric = nan\n", ("min_metric", "nan")),
    "infinite": (TARGET + "max_parameters = inf\n", ("max_parameters", "inf")),
    "negative": (TARGET + "max_parameters = -5000\n", ("max_parameters", "above 0")),
    "date": (TARGET + "max_parameters = 2026-01-01\n", ("max_parameters", "a date")),
    "empty target": ("[tool.htcompress.check.small]\n", ("[tool.htcompress.check.small]", "no report")),
    "target without limits": (TARGET, ("[tool.htcompress.check.small]", "no limits")),
    "empty section": (CHECK, ("needs a report", "[tool.htcompress.check.NAME]")),
    "limits without a report": (CHECK + "max_parameters = 5000\n", ("needs a report",)),
    "report beside targets": (CHECK + 'report = "out"\n' + TARGET + "max_parameters = 5\n", ("report", "move it")),
    "report is no path": ("[tool.htcompress.check.a]\nreport = 5\nmax_parameters = 5\n", ("report", "path", "5")),
    "report is empty": ('[tool.htcompress.check.a]\nreport = ""\nmax_parameters = 5\n', ("report", "path")),
    "report is not there": ('[tool.htcompress.check.a]\nreport = "gone"\nmax_parameters = 5\n', ("gone is not there",)),
    "check is no table": ("[tool.htcompress]\ncheck = 5\n", ("tool.htcompress.check is a table",)),
    "targets in a list": ('[[tool.htcompress.check]]\nreport = "out"\n', ("tool.htcompress.check is a table", "list")),
    "tool is no table": ("tool = 5\n", ("tool is a table",)),
    "not TOML": ("[tool.htcompress.check\n", ("pyproject.toml is not valid TOML",)),
    "key twice": (TARGET + "max_parameters = 5\nmax_parameters = 6\n", ("not valid TOML",)),
    "change without a baseline": (TARGET + 'max_parameters_change = "5%"\n', ("small", "--baseline")),
    "baseline without a change": (
        TARGET + 'baseline = "old"\nmax_parameters = 5\n',
        ("small", "max_parameters_change"),
    ),
    "baseline is the report": (TARGET + 'baseline = "out"\nmax_parameters_change = 5\n', ("an earlier one",)),
    "floor where a ceiling belongs": (TARGET + "max_metric = 0.9\n", ("accuracy", "use min_metric")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_configurations(htc: Command, tmp_path: Path, case: str) -> None:
    text, words = HOSTILE[case]
    (tmp_path / "pyproject.toml").write_text(text)
    ended = htc("check")
    assert (ended.code, ended.out) == (2, ""), ended.out
    (line,) = ended.err.splitlines()
    assert line.startswith("htcompress: ")
    assert line.endswith((".", "?"))
    assert len(line) < 600
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("check needs a report",)),
        (("out",), ("no limits", "--max-parameters 5000")),
        (("gone", "--max-parameters", "5"), ("gone is not there",)),
        ((".", "--max-parameters", "5"), ("no report.json",)),
        (("out", "--max-parameters", "many"), ("--max-parameters", "'many'")),
        (("out", "--max-drop", "5%"), ("--max-drop", "Write 0.05")),
        (("out", "--max-paramters", "5"), ("No such option", "--max-parameters")),
        (("out", "--target", "small", "--max-parameters", "5"), ("no target 'small'",)),
        (("out", "--config", "gone.toml", "--max-parameters", "5"), ("gone.toml cannot be read",)),
        (("out", "--baseline", "out/report.json", "--max-parameters-change", "5"), ("an earlier one",)),
        (("out", "--baseline", "out/report.json"), ("no limit compares with it",)),
        (("out/gone/report.json", "--max-drop", "0.1"), ("is not there",)),
    ],
)
def test_bad_calls(htc: Command, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    ended = htc("check", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    for word in words:
        assert word in ended.err


def test_a_floor_on_what_was_not_measured_is_an_error(htc: Command, out: Path) -> None:
    (out / "report.json").write_text(replace(sample_report(), quality=Quality()).to_json())
    for limit in ("--min-metric", "--max-metric", "--max-drop"):
        ended = htc("check", "out", limit, "0.5", "--junit", "found.xml")
        assert (ended.code, ended.out) == (2, "")
        assert "Convert again with --task" in ended.err
        assert ElementTree.parse("found.xml").find("testsuite/testcase/error") is not None


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"schema": "htcompress.report/2"}', "\x00", "{" * 9999])
def test_what_is_no_report(htc: Command, out: Path, text: str) -> None:
    (out / "report.json").write_text(text)
    ended = htc("check", "out", "--max-parameters", "5")
    assert (ended.code, ended.out) == (2, "")
    assert "report.json" in ended.err
    assert "unexpected" not in ended.err

"""How verdicts are shown, kept as golden files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len
from rich.console import Console
from sample_report import sample_report

from htcompress.checks import Target, Verdict, judge, parse_limit, views

Golden = Callable[[str, str], None]


def target(name: str | None, report: str, baseline: str | None = None, **limits: float | str) -> Target:
    parsed = tuple(parse_limit(limit, value) for limit, value in limits.items())
    return Target(Path(report), parsed, None if baseline is None else Path(baseline), name)


@pytest.fixture
def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Verdict, ...]:
    """Targets: one holds, one fails in many ways, one cannot be looked at in part, one is not there."""
    monkeypatch.chdir(tmp_path)
    report = sample_report()
    Path("video-ht").mkdir()
    Path("video-ht/report.json").write_text(report.to_json())
    totals = replace(report.totals, parameters_after=14_000, bytes_after=56_000)
    Path("last.json").write_text(replace(report, totals=totals).to_json())
    return judge(
        [
            target("video", "video-ht", max_parameters="16k", max_drop=0.01),
            target(
                "phone, 16 kB: a *long* name",
                "video-ht",
                "last.json",
                max_parameters="4k",
                min_ratio=3000,
                max_bytes=16_000,
                min_metric=0.97,
                max_output_error=0.05,
                max_parameters_change="5%",
                max_metric_change=0,
            ),
            target("wrong way", "video-ht", max_parameters="4k", max_metric=3),
            target(None, "no\x00where\x1b", max_parameters="4k"),
        ]
    )


def test_terminal(verdicts: tuple[Verdict, ...], golden: Golden) -> None:
    file = io.StringIO()
    Console(file=file, width=80, highlight=False, markup=False, emoji=False).print(views.to_terminal(verdicts))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(cell_len, lines)) <= 80
    golden("terminal.txt", "\n".join(lines) + "\n")


def test_markdown(verdicts: tuple[Verdict, ...], golden: Golden) -> None:
    golden("markdown.txt", views.to_markdown(verdicts))


def test_json(verdicts: tuple[Verdict, ...], golden: Golden) -> None:
    text = views.to_json(verdicts)
    found = json.loads(text)
    assert found["passed"] is False
    assert [t["passed"] for t in found["targets"]] == [True, False, False, False]
    golden("verdicts.json", text)


def test_junit(verdicts: tuple[Verdict, ...], golden: Golden) -> None:
    text = views.to_junit(verdicts)
    suites = ElementTree.fromstring(text)
    counted = [(s.get("tests"), s.get("failures"), s.get("errors")) for s in suites]
    assert counted == [("2", "0", "0"), ("7", "5", "0"), ("2", "1", "1"), ("1", "0", "1")]
    assert len(suites.findall(".//failure")) == 6
    golden("junit.xml", text)


def test_annotations(verdicts: tuple[Verdict, ...]) -> None:
    lines = views.to_annotations(verdicts)
    assert len(lines) == 6 + 2
    assert all(line.startswith("::error title=htcompress check%3A ") and "\n" not in line for line in lines)
    # The runner ends the title at the first comma or colon that is not escaped.
    assert "title=htcompress check%3A phone%2C 16 kB%3A a *long* name::max_parameters: found 15,080" in lines[0]
    assert "(5%25)" not in lines[0]
    assert any("+ 5%25" in line for line in lines)

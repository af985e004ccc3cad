"""The pages: whole, self-contained, escaped, and opened without an error where Chromium is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from htcompress.report import Quality, Report, to_html
from htcompress.report.html import command, study_to_html
from htcompress.report.study import Case, Dense, Point, Study

VOID = {"meta", "link", "br", "img", "path", "use", "rect"}
POINTS = (
    Point(Case("ht", 5000), 5000, 187.7, 20_000, 0.26, 0.9381, 0.9706, 2.28, 61.0),
    Point(Case("tt", 5000), 4932, 190.3, 19_728, 0.51, 0.8044, 0.9494, 17.1, 70.0),
    Point(Case("tr", 50), least=412),
)


class Page(HTMLParser):
    """What stands on a page: its text, its ids, what it refers to; tags have to match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.drawings: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.references += [named[key] or "" for key in ("src", "href", "xlink:href") if key in named]
        if tag == "svg":
            self.drawings.append(named["aria-label"] or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def study(kind: str = "compare") -> Study:
    return Study(
        kind=kind,
        version="0.1.0",
        source={"file": "model.pt", "sha256": None, "path": "../model.pt"},
        request={"steps": 400, "seed": 0},
        metric="accuracy",
        higher_is_better=True,
        latency="one call",
        dense=Dense(938_496, 3_753_984, 0.9556, 16.5),
        points=POINTS,
    )


def test_a_report_is_whole_and_needs_nothing_else(report: Report) -> None:
    html = to_html(report)
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    for reference in page.references:
        assert reference == "data:," or reference[0] == "#", reference
        assert reference[0] != "#" or reference[1:] in page.ids
    for used in re.findall(r"url\(#?([^)]*)\)", html):
        assert used in page.ids
    assert "<script" not in html
    assert "@import" not in html
    for figure in ("0.9650", "0.9375", "+0.0275", "0.8125", "59,775,272", "15,080", "118", "3.91 ms", "8.71 %"):
        assert figure in page.text
    assert page.drawings == [
        "Stored numbers against the error of the output",
        "Spectrum of encoder.rnn.l0",
        "Dimension tree of encoder.rnn.l0",
        "Dimension tree of encoder.rnn.l1.ih",
        "Dimension tree of encoder.rnn.l1.hh",
    ]


def test_a_tree_shows_its_modes_and_its_ranks(report: Report) -> None:
    drawn = to_html(report).split('aria-label="Dimension tree of encoder.rnn.l0"')[1].split("</svg>")[0]
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert sorted(labels) == sorted(
        [
            "4",
            "8",
            "8",
            "8",
            "12",
            "9",
            "9",
            "10",
            "3",
            "12",
            "4",
            "16",
            "16",
            "120",
            "161",
            "3",
            *["rows", "columns"] * 3,
        ]
    )


def test_the_same_report_makes_the_same_page(report: Report) -> None:
    assert to_html(report) == to_html(Report.from_json(report.to_json()))


def test_names_are_escaped(report: Report) -> None:
    evil = "<script>alert('x')</script> & \"co\""
    layer = replace(report.layers[0], name=evil, matrices=(replace(report.layers[0].matrices[0], name=evil),))
    quality = Quality().with_stage("dense", {evil: 0.5}, higher_is_better=True)
    page = to_html(replace(report, layers=(layer,), quality=quality, source={**report.source, "file": evil}))
    assert "<script" not in page
    assert evil in Page(page).text


def test_a_report_with_less_in_it(report: Report) -> None:
    bare = replace(report, quality=Quality(), frontier=(), latency=None, layers=report.layers[1:])
    page = Page(to_html(bare))
    assert page.drawings == []
    assert "Accuracy was not looked at" in page.text
    for heading in ("Size against what is lost", "Spectra", "Dimension trees", "latency"):
        assert heading not in page.text


def test_the_command_that_makes_it_again(report: Report) -> None:
    assert command(report) == "htcompress convert model.pt --budget 15100 --task task.py --seed 0"
    asked = {
        **report.request,
        "budget": None,
        "ratio": 12.5,
        "steps": 0,
        "finetuning": None,
        "layers": "my rnn*",
        "format": "tt",
    }
    assert command(replace(report, request=asked, seed=3)) == (
        "htcompress convert model.pt --ratio 12.5 --task task.py --format tt --layers 'my rnn*' --no-finetune --seed 3"
    )
    in_memory = replace(report, source={"file": "Tagger", "sha256": None, "path": None})
    assert command(in_memory) == "htcompress.compress(Tagger(...), budget=15100, seed=0)"


@pytest.mark.parametrize("kind", ["compare", "sweep"])
def test_a_study_links_to_its_points(kind: str) -> None:
    page = Page(study_to_html(study(kind)))
    assert [r for r in page.references if r[0] not in "#d"] == [
        "points/ht-5000/report.html",
        "points/tt-5000/report.html",
    ]
    for figure in ("0.9706", "0.9494", "4,932", "412 at least", "2.28", "16.5"):
        assert figure in page.text
    assert page.drawings == ["Stored numbers against the metric"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_opens_it_without_a_word(report: Report, tmp_path: Path) -> None:
    for name, html in (("report", to_html(report)), ("study", study_to_html(study()))):
        page = tmp_path / f"{name}.html"
        page.write_text(html, encoding="utf-8")
        for width in (400, 1200):
            ran = subprocess.run(
                [
                    "chromium",
                    "--headless=new",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--enable-logging=stderr",
                    f"--window-size={width},1600",
                    f"--screenshot={tmp_path / 'shot.png'}",
                    page.as_uri(),
                ],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert (tmp_path / "shot.png").stat().st_size > 10_000, ran.stderr
            assert "CONSOLE" not in ran.stderr
            (tmp_path / "shot.png").unlink()

"""Whatever stands in a report.json: an error that says so, or a report that all views can show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crossing import some
from rich.console import Console

from htcompress.checks import config, verdict, views
from htcompress.checks.limits import RULES, parse_limit
from htcompress.errors import CheckpointError, HTCompressError
from htcompress.report import Report, model_card, read_report, to_html, to_markdown
from htcompress.report.report import MOST_BYTES
from htcompress.report.terminal import to_terminal

MATRIX = ("layers", 0, "matrices", 0)
HUGE = [10**400, -(10**400), 1e308, -1, -1.5, 0, True, None, "", "text", [], [[]], {}, {"a": 1}, [1, 2]]
PLACES: list[tuple[Any, ...]] = [
    ("seed",),
    ("version",),
    ("source",),
    ("source", "file"),
    ("source", "path"),
    ("request",),
    ("request", "budget"),
    ("request", "time_limit"),
    ("request", "steps"),
    ("totals", "parameters_before"),
    ("totals", "parameters_after"),
    ("totals", "ratio"),
    ("totals", "bytes_before"),
    ("totals", "macs_per_step_before"),
    ("layers",),
    ("layers", 0),
    ("layers", 0, "name"),
    ("layers", 0, "settings"),
    ("layers", 0, "settings", "kind"),
    ("layers", 0, "settings", "hidden_size"),
    ("layers", 0, "settings", "cell"),
    ("layers", 0, "scope"),
    ("layers", 0, "units_reordered"),
    (*MATRIX, "name"),
    (*MATRIX, "shape"),
    (*MATRIX, "layout"),
    (*MATRIX, "row_modes"),
    (*MATRIX, "col_modes"),
    (*MATRIX, "tree"),
    (*MATRIX, "ranks"),
    (*MATRIX, "ranks", "0"),
    (*MATRIX, "parameters"),
    (*MATRIX, "error"),
    (*MATRIX, "error", "outputs"),
    (*MATRIX, "spectrum"),
    (*MATRIX, "kept_dense"),
    ("quality", "metric"),
    ("quality", "dense"),
    ("quality", "finetuned"),
    ("quality", "metrics"),
    ("quality", "higher_is_better"),
    ("frontier",),
    ("frontier", 0),
    ("latency",),
    ("latency", "dense_ms"),
    ("timings_s", "decompose"),
]


def put(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return data


def show(report: Report, folder: Path) -> None:
    """Every view, and the gate with every limit."""
    console = Console(width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_terminal(report))
    (folder / "report.html").write_text(to_html(report), encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    assert read_report(folder) == report
    limits = [parse_limit(name, 0.5 if "error" in name or "metric" in name else 10) for name in RULES]
    (folder / "earlier.json").write_text(report.to_json(), encoding="utf-8")
    for limit in limits:
        target = config.Target(folder, (limit,), folder / "earlier.json" if limit.rule.change else None)
        judged = verdict.judge([target])
        console.print(views.to_terminal(judged))
        for view in (views.to_json, views.to_junit, views.to_markdown, views.to_annotations):
            view(judged)


@pytest.mark.parametrize("place", some(PLACES, *PLACES[::3]), ids=lambda place: ".".join(map(str, place)))
def test_a_value_in_place_of_another(report: Report, place: tuple[Any, ...], tmp_path: Path) -> None:
    refused, accepted = [], []
    for value in HUGE:
        text = json.dumps(put(json.loads(report.to_json()), place, value))
        try:
            again = Report.from_json(text)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            accepted.append(again)
    assert all(len(message) < 500 and message.endswith("Convert the model again.") for message in refused)
    for again in accepted[:2]:
        show(again, tmp_path)


WRONG: dict[str, tuple[Callable[[str], str], str]] = {
    "an infinite number": (lambda t: t.replace("3963.9", "1e999"), "totals.ratio: number out of range"),
    "a number of a million digits": (
        lambda t: t.replace("3963.9", "9" * 1_000_000),
        "totals.ratio: number out of range",
    ),
    "half a character": (lambda t: t.replace("encoder.rnn", "\\ud800"), "unexpected end of hex escape"),
    "nested without end": (lambda t: t.replace('"auto"', "[" * 500 + "]" * 500), "request[...]: expected"),
    "nested past all measure": (lambda t: t.replace('"auto"', "[" * 100_000), "nested too deeply"),
    "nothing before": (
        lambda t: t.replace('"bytes_before": 239101088', '"bytes_before": 0'),
        "bytes_before is 0, and bytes_after is not",
    ),
    "a negative count": (
        lambda t: t.replace('"parameters_after": 15080', '"parameters_after": -15080'),
        "totals.parameters_after: expected int >= 0",
    ),
    "no goal": (lambda t: t.replace('"budget": 15100', '"budget": null'), "its request has no goal"),
    "a latency of nothing": (lambda t: t.replace("118.25", "0.0"), "a latency is not above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_report_has(report: Report, case: str) -> None:
    change, words = WRONG[case]
    text = change(report.to_json())
    assert text != report.to_json()
    with pytest.raises(CheckpointError) as caught:
        Report.from_json(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("tree", [[0], [[0, 1], [0, 1]], [0, 99], [0, -1], [0, True], [0, "1"], [[], 0], None, 7])
def test_trees_that_are_none(report: Report, tree: Any) -> None:
    text = json.dumps(put(json.loads(report.to_json()), (*MATRIX, "tree"), tree))
    with pytest.raises(CheckpointError, match=r"the tree of encoder\.rnn\.l0"):
        Report.from_json(text)


def test_a_file_past_all_measure(tmp_path: Path) -> None:
    with (tmp_path / "report.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(HTCompressError, match="more than a report ever has"):
        read_report(tmp_path)


def test_numbers_near_what_is_allowed_are_shown(report: Report, tmp_path: Path) -> None:
    data = json.loads(report.to_json())
    for key in data["totals"]:
        data["totals"][key] = 1 << 62
    data["quality"] |= {"dense": 1e308, "decomposed": -1e308, "finetuned": 1e-308}
    data["frontier"] = [[1, 0.0], [1 << 62, 1e9]]
    data["latency"] |= {"dense_ms": 1e300, "compressed_ms": 1e-300}
    again = Report.from_json(json.dumps(data))
    assert math.isfinite(again.totals.ratio)
    show(again, tmp_path)

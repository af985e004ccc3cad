"""Studies: the same numbers wherever they run, nothing repeated, nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Tagger, listing, save_tagger, write_task

import htcompress
from htcompress import study
from htcompress.errors import CheckpointError, RequestError, TaskError, UnreachableError
from htcompress.observer import Observer
from htcompress.report.study import cases
from htcompress.request import FineTuning, Goal
from htcompress.study import Case, Engine, Place, Point, Study

SERIAL = Place(jobs=1)
TUNING = FineTuning(steps=5)
SIZES = (200, 400, 800)


class Told(Observer):
    """Keeps the messages; interrupts after the first point where told to."""

    def __init__(self, *, interrupt: bool = False) -> None:
        self.messages: list[str] = []
        self.interrupt = interrupt

    def message(self, text: str) -> None:
        self.messages.append(text)
        if self.interrupt:
            raise KeyboardInterrupt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    return tmp_path


def swept(folder: Path, out: str = "out", place: Place = SERIAL, **options: Any) -> Study:
    options = {"budgets": SIZES, "finetuning": TUNING, "task": folder / "task.py", **options}
    return study.sweep(folder / "model.pt", folder / out, place=place, **options)


def numbers(made: Study) -> list[Point]:
    """What must not depend on where and when a study runs."""
    return [replace(point, latency_ms=None, seconds=None) for point in made.points]


def test_a_sweep_is_what_convert_makes(folder: Path) -> None:
    made = swept(folder)
    assert [point.case for point in made.points] == [Case("ht", size) for size in SIZES]
    for point in made.points:
        place = folder / "out" / "points" / point.case.name
        single = htcompress.convert(
            folder / "model.pt", goal=Goal(point.case.budget), task=folder / "task.py", finetuning=TUNING
        )
        totals, quality = single.report.totals, single.report.quality
        assert (point.parameters, point.ratio, point.bytes) == (
            totals.parameters_after,
            totals.ratio,
            totals.bytes_after,
        )
        assert (point.decomposed, point.finetuned) == (quality.decomposed, quality.finetuned)
        loaded = htcompress.load(place, Tagger()).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in single.tensors.items())
        assert point.latency_ms is not None
        assert point.latency_ms > 0
        report = json.loads((place / "report.json").read_text())
        assert (place / report["source"]["path"]).resolve() == (folder / "model.pt").resolve()
        assert report["request"]["task"] == str(folder / "task.py")
    assert made.dense.metric == single.report.quality.dense
    assert made.dense.parameters == single.report.totals.parameters_before
    written = (folder / "out" / "study.json").read_text()
    assert Study.from_json(written) == made
    assert "| HT | 200 |" in (folder / "out" / "study.md").read_text()


@pytest.mark.full
@pytest.mark.whole
def test_processes_give_the_same_numbers(folder: Path) -> None:
    assert numbers(swept(folder, "a")) == numbers(swept(folder, "b", Place(jobs=2)))


@pytest.mark.full
@pytest.mark.whole
def test_dask_workers_give_the_same_numbers(folder: Path) -> None:
    from distributed import LocalCluster

    alone = numbers(swept(folder, "a"))
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        made = swept(folder, "b", Place(engine=Engine.DASK, scheduler=cluster.scheduler_address))
    assert numbers(made) == alone


def test_an_interrupted_study_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = swept(folder, "whole")
    with pytest.raises(KeyboardInterrupt):
        swept(folder, observer=Told(interrupt=True))
    kept = listing(folder / "out" / "points")
    assert "ht-200.json" in kept
    assert not any(name.startswith("ht-800") for name in kept)
    done: list[Case] = []
    from htcompress.study import run

    original = run.compress_case

    def counted(job: Any) -> Any:
        done.append(job.case)
        return original(job)

    monkeypatch.setattr(run, "compress_case", counted)
    again = Told()
    made = swept(folder, observer=again)
    assert again.messages[0] == "1 of 3 points are there already."
    assert done == [Case("ht", 400), Case("ht", 800)]
    assert numbers(made) == numbers(whole)
    after = listing(folder / "out" / "points")
    assert {name: after[name] for name in kept} == kept
    swept(folder)
    assert len(done) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"finetuning": FineTuning(steps=6)},
        *(
            pytest.param(changed, marks=pytest.mark.full)
            for changed in ({"finetuning": None}, {"scope": "separate"}, {"layers": "rnn*"})
        ),
    ],
    ids=str,
)
def test_what_was_asked_otherwise_is_done_anew(folder: Path, changed: dict[str, Any]) -> None:
    swept(folder, budgets=[300])
    told = Told()
    swept(folder, budgets=[300], observer=told, **changed)
    assert told.messages[0].startswith("1 of 1: ht-300 stores")


def test_another_model_or_task_is_another_study(folder: Path) -> None:
    swept(folder, budgets=[300])
    save_tagger(folder / "model.pt", seed=1)
    told = Told()
    swept(folder, budgets=[300], observer=told)
    assert len(told.messages) == 1
    write_task(folder / "task.py", "extra = 1")
    told = Told()
    swept(folder, budgets=[300], observer=told)
    assert told.messages[0].startswith("1 of 1")


def test_a_point_that_was_damaged_is_made_again(folder: Path) -> None:
    first = swept(folder, budgets=[300])
    (folder / "out" / "points" / "ht-300" / "report.json").unlink()
    assert numbers(swept(folder, budgets=[300])) == numbers(first)


def test_a_comparison_treats_all_formats_alike(folder: Path) -> None:
    made = study.compare(
        folder / "model.pt",
        folder / "out",
        budget=500,
        formats=["ht", "tt", "svd"],
        task=folder / "task.py",
        finetuning=TUNING,
        place=SERIAL,
    )
    assert [point.case.format for point in made.points] == ["ht", "tt", "svd"]
    assert all(point.parameters is not None and point.parameters <= 500 for point in made.points)
    finals = [point.final for point in made.best_first()]
    assert finals == sorted(finals, key=lambda value: -(value or 0))
    for point in made.points:
        report = json.loads((folder / "out" / "points" / point.case.name / "report.json").read_text())
        assert report["request"]["format"] == point.case.format
        layouts = {m["layout"] for layer in report["layers"] for m in layer["matrices"] if not m["kept_dense"]}
        assert layouts <= {"ht": {"split", "svd"}, "tt": {"tt"}, "svd": {"svd"}}[point.case.format]


def test_a_budget_that_cannot_be_reached_is_a_point_that_says_so(folder: Path) -> None:
    made = swept(folder, budgets=[10, 400])
    unreachable, fine = made.points
    assert unreachable.parameters is None
    assert unreachable.least is not None
    assert 10 < unreachable.least <= 400
    assert fine.parameters is not None
    assert f"{unreachable.least:,} at least" in (folder / "out" / "study.md").read_text()
    with pytest.raises(UnreachableError, match=f"the smallest that can is {unreachable.least}"):
        swept(folder, "none", budgets=[10])


def test_a_broken_task_loses_no_point(folder: Path) -> None:
    """The second point's evaluation fails; the first is kept, and the error is the task's."""
    counter = folder / "count"
    write_task(
        folder / "task.py",
        f"""
def evaluate(model):
    import pathlib
    count = pathlib.Path({str(counter)!r})
    seen = int(count.read_text()) if count.exists() else 0
    count.write_text(str(seen + 1))
    if seen > 3:
        raise RuntimeError("no more")
    return 0.5
""",
    )
    with pytest.raises(TaskError, match=r"evaluate\(\) .* raised RuntimeError: no more"):
        swept(folder)
    assert (folder / "out" / "points" / "ht-200" / "report.json").is_file()
    assert not (folder / "out" / "study.json").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"budgets": []}, "needs budgets"),
    "a negative budget": ({"budgets": [-5]}, "at least 1; found -5"),
    "an error of one": ({"budgets": [], "errors": [1.0]}, "below 1"),
    "a format": ({"formats": ["tucker"]}, "--formats is one of ht, tt, tr, bt, svd, dense; found 'tucker'"),
    "a scope": ({"scope": "all"}, "--scope is one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(folder: Path, case: str) -> None:
    options, message = BAD[case]
    before = listing(folder)
    with pytest.raises(RequestError, match=message):
        swept(folder, **options)
    assert listing(folder) == before


def test_places_that_make_no_sense() -> None:
    for options, message in (
        ({"jobs": 0}, "at least 1"),
        ({"engine": Engine.DASK}, "address of a scheduler"),
        ({"scheduler": "tcp://here:1"}, "add --engine dask"),
    ):
        with pytest.raises(RequestError, match=message):
            Place(**options)


def test_what_is_no_study_is_left_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years")
    with pytest.raises(RequestError, match="is no study of htcompress"):
        swept(folder)
    with pytest.raises(RequestError, match="is a file"):
        swept(folder, "model.pt")
    assert (folder / "out" / "thesis.tex").read_text() == "years"


def test_json_that_is_no_study() -> None:
    for text in ("{", "[]", "{}", '{"schema": "other/1"}', '{"schema": "htcompress.study/1", "points": [{}]}'):
        with pytest.raises(CheckpointError):
            Study.from_json(text)


def test_cases_are_named_and_asked_for_once() -> None:
    found = cases(["ht", "tt", "ht"], budgets=[5000, 5000], errors=[0.1])
    assert [case.name for case in found] == ["ht-5000", "tt-5000", "ht-error-0.1", "tt-error-0.1"]

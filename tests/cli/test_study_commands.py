"""`sweep` and `compare` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from small import Outcome, save_tagger, write_task

Command = Callable[..., Outcome]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    return tmp_path


COMMON = ("--task", "task.py", "--steps", "3", "--jobs", "1")


def test_sweep(htc: Command, folder: Path) -> None:
    ended = htc("sweep", "model.pt", "--budgets", "0.2k,400", *COMMON)
    assert ended.code == 0
    assert max(map(cell_len, ended.out.splitlines())) <= 80
    assert ended.out.endswith(" written to model-sweep  (study.html, study.json; each point in points/)\n")
    assert "note: 2 of 2: ht-400 stores" in ended.err
    assert sorted(path.name for path in (folder / "model-sweep").iterdir()) == [
        "points",
        "study.html",
        "study.json",
        "study.md",
    ]
    again = htc("sweep", "model.pt", "--budgets", "0.2k,400", *COMMON)
    assert "note: 2 of 2 points are there already." in again.err


def test_compare_as_json(htc: Command, folder: Path) -> None:
    ended = htc("compare", "model.pt", "--budget", "500", "--formats", "ht,svd", *COMMON, "-o", "out", "--json", "-q")
    assert ended.code == 0
    assert ended.err == ""
    data = json.loads(ended.out)
    assert data["schema"] == "htcompress.study/1"
    assert data["kind"] == "compare"
    assert [point["case"]["format"] for point in data["points"]] == ["ht", "svd"]
    assert json.loads((folder / "out" / "study.json").read_text()) == data


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("sweep", "model.pt", "--budgets", "1k"), 2, "--task"),
        (("sweep", "model.pt", *COMMON), 2, "needs budgets"),
        (("sweep", "model.pt", "--budgets", "many", *COMMON), 2, "--budgets is a whole number"),
        (("sweep", "model.pt", "--budgets", "1k", "--formats", "cp", *COMMON), 2, "--formats is one of"),
        (("sweep", "model.pt", "--budgets", "9", *COMMON), 3, "smallest that can is"),
        (("compare", "model.pt", *COMMON), 2, "--budget"),
        (("compare", "model.pt", "--budget", "500", "--engine", "slurm", *COMMON), 2, "--engine is one of local, dask"),
        (("compare", "model.pt", "--budget", "500", "--engine", "dask", *COMMON), 2, "--scheduler"),
        (("compare", "none.pt", "--budget", "500", *COMMON), 2, "none.pt"),
    ],
)
def test_bad_input(htc: Command, folder: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    ended = htc(*arguments)
    assert ended.code == code
    assert message in ended.err
    assert ended.err.splitlines()[-1].startswith("htcompress: ")
    assert ended.out == ""

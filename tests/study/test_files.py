"""A study knows which files its task is made of, and when one of them has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from crossing import some
from small import save_tagger, write_task

import htcompress
from htcompress.study import Place

SPLIT = """
def calibration():
    import neighbour
    from pathlib import Path
    scale = float((Path(__file__).parent / "data.txt").read_text())
    for x, _ in batches(1, 4):
        yield x * scale * neighbour.SCALE
"""


@pytest.mark.parametrize("file", some(["task.py", "neighbour.py", "data.txt", None], "neighbour.py", "data.txt"))
def test_a_changed_file_of_the_task_makes_a_new_point(tmp_path: Path, file: str | None) -> None:
    task = write_task(tmp_path / "task.py", SPLIT)
    (tmp_path / "neighbour.py").write_text("SCALE = 1.0\n")
    (tmp_path / "data.txt").write_text("1.0")
    (tmp_path / "notes.txt").write_text("nobody reads this")
    checkpoint = save_tagger(tmp_path / "model.pt")

    def swept() -> float:
        htcompress.study.sweep(checkpoint, tmp_path / "study", budgets=[300], task=task, place=Place(jobs=1))
        return (tmp_path / "study" / "points" / "ht-300.json").stat().st_mtime_ns

    first = swept()
    assert swept() == first
    (tmp_path / "notes.txt").write_text("nor this")
    if file is not None:
        (tmp_path / file).write_text((tmp_path / file).read_text() + {"data.txt": "1"}.get(file, "\n# changed\n"))
    assert (swept() == first) == (file is None)

"""Every Python snippet of the README and the documentation runs as it stands, page by page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from htcompress.nn import recurrent_modules
from htcompress.task import load_task

ROOT = Path(__file__).parent.parent
SNIPPETS = {
    page: found
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if (found := re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
}
TASKS = [(page, text) for page, found in SNIPPETS.items() for text in found if "def model()" in text]


def test_there_are_snippets() -> None:
    assert {page.name for page in SNIPPETS} >= {"README.md", "task.md", "library.md"}
    assert len(TASKS) >= 2


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.stem)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "snippet"}
    for text in SNIPPETS[page]:  # in order: what one saves, the next may load
        exec(compile(text, f"a snippet of {page.name}", "exec"), scope)


@pytest.mark.parametrize(("page", "text"), TASKS, ids=lambda value: getattr(value, "stem", ""))
def test_example_tasks_are_tasks(page: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text(text, encoding="utf-8")
    task = load_task(path)
    model = task.model()
    assert recurrent_modules(model)
    for arguments in task.calibration():
        model(*arguments)
    assert task.evaluate(model)

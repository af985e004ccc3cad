"""Every snippet of the README and the documentation runs as it stands, page by page."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from htcompress_cli.reference import reference
from small import Outcome, save_tagger, write_task

import htcompress
from htcompress.checks import read_targets
from htcompress.data import arguments
from htcompress.model.replace import recurrent_modules
from htcompress.request import FineTuning, Goal
from htcompress.task import load_task

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(language: str) -> dict[Path, list[str]]:
    """The snippets in a language, by page, in order."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return {page: found for page in PAGES if (found := pattern.findall(page.read_text(encoding="utf-8")))}


SNIPPETS = snippets("python")
COMMANDS = {
    page: [line[2:].split("#")[0] for text in found for line in text.splitlines() if line.startswith("$ htcompress ")]
    for page, found in snippets("console").items()
}
TASKS = [
    (page, text)
    for page, found in SNIPPETS.items()
    for text in found
    if re.search(r"\A(# task\.py|import torch)", text) and "def model()" in text
]


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
    for item in task.calibration():
        model(*arguments(item))
    assert task.evaluate(model)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a checkpoint, its task, an output directory; the sample under its name."""
    root = tmp_path_factory.mktemp("prepared")
    places = [root, *(root / "sample_models" / name for name in ("moving_digits", "japanese_vowels"))]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        save_tagger(place / "model.pt")
        write_task(place / "task.py")
    goal, options = Goal(budget=400), FineTuning(steps=30)
    made = htcompress.convert(root / "model.pt", goal=goal, task=root / "task.py", finetuning=options)
    for name in ("model-ht", "moving_digits-ht"):
        htcompress.save(made, root / name)
    return root


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


STUDIES = ("choosing-a-budget", "measured")
"""Pages whose commands are studies of many points."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.full if page.stem in STUDIES else (), id=page.stem)
        for page, found in COMMANDS.items()
        if found
    ],
)
def test_commands_run(page: Path, folder: Path, htc: Callable[..., Outcome]) -> None:
    """On a small model in place of the one that the page speaks of: what is tested is that the commands are right."""
    for command in COMMANDS[page]:
        name, *arguments = shlex.split(re.sub(r"--steps \d+", "--steps 8", command))
        assert name == "htcompress"
        ended = htc(*arguments)
        # Limits of a page need not hold for the small model; that they can be looked at must.
        assert ended.code in ((0, 1) if arguments[0] == "check" else (0,)), f"{command}: {ended.err}"


def test_configurations_are_valid(tmp_path: Path) -> None:
    for page, found in snippets("toml").items():
        for text in found:
            (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
            assert read_targets(config=tmp_path / "pyproject.toml"), page


def test_workflows_use_the_action_as_it_is() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    steps = [
        step
        for found in snippets("yaml").values()
        for text in found
        for job in yaml.safe_load(text)["jobs"].values()
        for step in job["steps"]
        if "htcompress" in step.get("uses", "")
    ]
    assert steps
    for step in steps:
        assert set(step["with"]) <= set(action["inputs"])


def test_the_reference_is_written_from_the_code() -> None:
    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert written == reference(), "run python -m htcompress_cli.reference > docs/reference.md"

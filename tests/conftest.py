"""One thread makes the tests repeatable and polite; shapes are checked where that is asked for."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

FULL = "--full" in sys.argv or os.environ.get("HTCOMPRESS_FULL_TESTS") == "1"
# Shapes in signatures, checked at every call: a third of the time of what is checked.
if FULL or os.environ.get("HTCOMPRESS_CHECK_SHAPES") == "1":
    CHECKED = ["matrix", "forms.dense", "forms.ht", "forms.refine", "nn", "planning", "model"]
    # What a search calls ten thousand times is checked in full runs.
    CHECKED += ["forms.ht_decompose", "tensor.hsvd", "tensor.ht"] if FULL else []
    hook = install_import_hook([f"htcompress.{name}" for name in CHECKED], "checking.check")
    hook.__enter__()

import pytest  # noqa: E402
import torch  # noqa: E402
from htcompress_cli import main  # noqa: E402
from small import Outcome, tagger  # noqa: E402

import htcompress  # noqa: E402
from htcompress import Compressed  # noqa: E402
from htcompress.forms.refine import refine_cores  # noqa: E402

Command = Callable[..., Outcome]

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
torch.set_num_threads(1)


SLOW = (
    "architectures",
    "faults",
    "docs",
    "action",
    "study",
    "interrupts",
    "degenerate",
    "fuzzer",
    "onnx_models",
    "imports",
    "together",
)
"""What takes long stands last; `make fast` leaves it out."""

THOROUGH = ("forms", "matrix", "report", "tensor")
"""Folders whose tests hold how good a search is, and how its drawings look; plans are of whatever it finds."""


def pytest_configure(config: pytest.Config) -> None:
    os.environ["HTCOMPRESS_FULL_TESTS"] = "1" if config.getoption("--full") else "0"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rest of full cross products unless asked for, mark what is slow, and put it last."""
    if not config.getoption("--full"):
        left = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.drawn)
        if any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="Run full cross products, too.")
    parser.addoption("--update-golden", action="store_true", help="Write the golden files anew from what is shown now.")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _brief(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time goes into what is not tested, so that is brief: a search of few rungs, cores refined by two
    iterations, short fine-tuning where no length is asked for, drawings without lines. Tests marked `whole`, and those
    of how good a search is, have all of it."""
    if request.node.get_closest_marker("whole") is not None:
        return
    monkeypatch.setattr("htcompress.finetuning.distill._STAGE", 30)
    if request.path.relative_to(Path(__file__).parent).parts[0] in THOROUGH:
        return
    monkeypatch.setattr("htcompress.forms.ht_search.refine_cores", partial(_briefly_refined, refine_cores))
    monkeypatch.setattr("htcompress.forms.ht_search._LADDER_RATIO", 4.0)
    monkeypatch.setattr("htcompress.forms.network_search._LADDER_RATIO", 6.0)
    for drawing in ("spectrum", "tree", "trade_off"):
        monkeypatch.setattr(f"htcompress.report.plots.{drawing}", lambda _: '<svg role="img"></svg>')
    monkeypatch.setattr("htcompress.report.plots._svg", lambda figure, label: '<svg role="img"></svg>')


def _briefly_refined(refine: Callable[..., Any], *arguments: Any, iterations: int = 0) -> Any:
    return refine(*arguments, iterations=2)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with a file in the folder `golden` beside the test; `--update-golden` writes the file."""
    folder = Path(request.path).parent / "golden"

    def compare(name: str, text: str) -> None:
        path = folder / name
        if request.config.getoption("--update-golden"):
            folder.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing; run pytest --update-golden and look at it"
        assert text == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture(scope="session")
def compressed() -> Compressed:
    """A small model in tree layouts, without data; for reading only."""
    torch.manual_seed(0)
    return htcompress.compress(tagger(), budget=400)


@pytest.fixture
def htc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command line with an empty folder as the present one."""
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["htcompress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.run()
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, *capsys.readouterr())

    yield run
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)

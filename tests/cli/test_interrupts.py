"""SIGINT and SIGTERM at any moment: 130, or 0 where it was done; the directory whole or absent; nothing else left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from crossing import FULL, crossed, some
from small import Outcome, listing, save_tagger, tagger, write_task

import htcompress
from htcompress.directory import write as writing
from htcompress.directory.read import load
from htcompress.report import read_report

Command = Callable[..., Outcome]

FILES = {"model.safetensors", "config.json", "report.json", "report.md", "report.html", "README.md"}
CONVERT = ("convert", "model.pt", "--budget", "400", "--layout", "svd", "-o", "made/out", "--task", "task.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """As a shell in the foreground leaves them, whatever started the tests: a job in the background ignores SIGINT."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


MOMENTS = '''
"""Runs one command many times, each in a child of its own, and interrupts each at another moment."""
import json, os, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
# Everything slow, so that the moments fall into the work; importing is the next test's.
import htcompress.compression, htcompress.report.terminal, htcompress_cli.commands
import safetensors.torch, torch._dynamo, typer.main
from htcompress_cli import main

command, moments = json.loads(sys.argv[1]), int(sys.argv[2])


def child(index):
    os.mkdir(str(index))
    for name in ("model.pt", "task.py"):
        shutil.copy(name, str(index))
    pid = os.fork()
    if pid == 0:
        os.chdir(str(index))
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["htcompress", *command]
        try:
            main.run()
        except SystemExit as ended:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(ended.code)
    return pid


def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


began = time.perf_counter()
codes = [(0, code(child(0)))]
whole = time.perf_counter() - began
for index in range(1, moments + 1):
    number = (signal.SIGINT, signal.SIGTERM)[index % 2]
    pid = child(index)
    time.sleep(0.03 + (1.2 * whole - 0.03) * index / moments)
    os.kill(pid, number)
    codes.append((index, code(pid)))
print(json.dumps(codes))
'''


def whole_or_absent(place: Path) -> bool:
    """Whether an output directory stands: then all of it, else no trace; in both cases nothing beside it."""
    left = [path for path in place.parent.parent.iterdir() if path.name == place.parent.name]
    if not place.exists():
        assert left == []
        return False
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert {path.name for path in place.iterdir()} == FILES
    read_report(place)
    load(place, tagger())
    return True


@pytest.mark.full
@pytest.mark.drawn
def test_at_many_moments_of_a_conversion(tmp_path: Path) -> None:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    command = json.dumps([*CONVERT, "--steps", "60"])
    ran = subprocess.run(
        [sys.executable, "-c", MOMENTS, command, str(40 if FULL else 4)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    codes = json.loads(ran.stdout)
    assert codes[0] == [0, 0]
    for index, code in codes:
        here = tmp_path / str(index)
        assert code in (0, 130), (here / "stderr").read_text()
        stands = whole_or_absent(here / "made" / "out")
        assert stands or code == 130
        errors = (here / "stderr").read_text()
        assert "Traceback" not in errors
        assert "Exception" not in errors
        lines = [line for line in errors.splitlines() if not line.endswith(" ...")]
        assert lines == (["htcompress: interrupted; no output was left half-written."] if code == 130 else [])
        if code == 130:
            assert (here / "stdout").read_text() == ""
    assert 130 in [code for _, code in codes]


@pytest.mark.parametrize(
    ("number", "imported"),
    crossed(list(product([signal.SIGINT, signal.SIGTERM], ["typer.main", "numpy", "torch.nn", "torch"])), 1),
)
def test_while_libraries_are_imported(tmp_path: Path, imported: str, number: signal.Signals) -> None:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    before = listing(tmp_path)
    program = "from htcompress_cli.main import run; run()"
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-c", program, *CONVERT],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == imported:
                break
        else:
            pytest.fail(f"{imported} is not imported")
        process.send_signal(number)
        rest = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
        assert process.stdout.read() == ""
        assert process.wait(60) == 130
    assert rest == ["htcompress: interrupted; no output was left half-written."]
    assert listing(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("moment", ["to_markdown", "model_card", "_umask"])
def test_within_the_writing(
    htc: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    replacing: bool,
    moment: str,
) -> None:
    save_tagger(tmp_path / "model.pt")
    command = ("convert", "model.pt", "--layout", "svd", "-o", "made/out")
    if replacing:
        assert htc(*command, "--budget", "300").code == 0
    original = getattr(writing, moment)

    def interrupted(*arguments: object) -> object:
        signal.raise_signal(number)
        return original(*arguments)

    monkeypatch.setattr(writing, moment, interrupted)
    ended = htc(*command, "--budget", "400")
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "htcompress: interrupted; no output was left half-written."
    # The signal waited until the directory stood.
    assert whole_or_absent(tmp_path / "made" / "out")
    assert read_report(tmp_path / "made" / "out").request["budget"] == 400


def test_a_second_interrupt_does_not_disturb_the_first(
    htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tagger(tmp_path / "model.pt")
    original = htcompress.stages.plan_model

    def interrupted(*arguments: object, **options: object) -> object:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            monkeypatch.setattr(htcompress.stages, "plan_model", original)
        return original(*arguments, **options)

    from htcompress_cli import main

    deafen = main._deafen

    def deafened() -> None:
        deafen()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(htcompress.stages, "plan_model", interrupted)
    monkeypatch.setattr(main, "_deafen", deafened)
    ended = htc("convert", "model.pt", "--budget", "400", "-o", "out")
    assert ended.code == 130
    assert not (tmp_path / "out").exists()


def test_finetune_interrupted_leaves_the_directory_as_it_was(
    htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    assert htc("convert", "model.pt", "--budget", "400", "--layout", "svd", "-o", "out").code == 0
    before = listing(tmp_path / "out")
    write_task(
        tmp_path / "task.py",
        "import signal\nseen = []",
        "def loss(output, target):\n    seen.append(1)\n    if len(seen) == 12:\n"
        "        signal.raise_signal(signal.SIGINT)\n    return output.sum()",
    )
    ended = htc("finetune", "out", "--task", "task.py", "--steps", "30")
    assert ended.code == 130
    assert "fine-tuning ..." in ended.err
    assert listing(tmp_path / "out") == before


def test_an_interrupt_that_a_task_swallows_is_not_lost(htc: Command, tmp_path: Path) -> None:
    save_tagger(tmp_path / "model.pt")
    write_task(
        tmp_path / "task.py",
        "import signal\n"
        "def evaluate(model):\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    except KeyboardInterrupt as error:\n"
        "        raise ValueError('lost') from error",
    )
    ended = htc(*CONVERT, "--no-finetune")
    assert ended.code == 130
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("number", some([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_an_interrupt_in_a_finaliser_is_not_lost(htc: Command, tmp_path: Path, number: signal.Signals) -> None:
    """Python drops what is raised there, and would go on."""
    save_tagger(tmp_path / "model.pt")
    write_task(
        tmp_path / "task.py",
        "import signal, time\n"
        "class Dropped:\n"
        "    def __del__(self):\n"
        f"        signal.raise_signal({int(number)})\n"
        "def evaluate(model):\n"
        "    Dropped()\n"
        "    time.sleep(3)\n"
        "    return 0.5",
    )
    ended = htc(*CONVERT, "--no-finetune")
    assert ended.code == 130
    lines = [line for line in ended.err.splitlines() if not line.endswith(" ...")]
    assert lines == ["htcompress: interrupted; no output was left half-written."]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("number", some([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_a_signal_that_is_ignored_from_the_start_stays_so(tmp_path: Path, number: signal.Signals) -> None:
    """As nohup and shells that put jobs into the background expect it."""
    save_tagger(tmp_path / "model.pt")
    write_task(
        tmp_path / "task.py",
        "import os, signal\n"
        "def evaluate(model):\n"
        "    for number in (signal.SIGINT, signal.SIGTERM):\n"
        "        if signal.getsignal(number) is signal.SIG_IGN:\n"
        "            os.kill(os.getpid(), number)\n"
        "    return 0.5",
    )
    program = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\nfrom htcompress_cli.main import run; run()"
    ended = subprocess.run(
        [sys.executable, "-c", program, *CONVERT, "--no-finetune"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert whole_or_absent(tmp_path / "made" / "out")

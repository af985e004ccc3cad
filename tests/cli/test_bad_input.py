"""Bad input ends with one message that says what to do, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Outcome, Tagger, listing, save_tagger, write_task
from torch import Tensor, nn

from htcompress import compression

Command = Callable[..., Outcome]
Prepare = Callable[[Path], object]

FAST = ("--layout", "svd", "-o", "out")
CONVERT = ("convert", "model.pt", "--budget", "400", *FAST)
WITH_TASK = (*CONVERT, "--task", "task.py", "--steps", "5")


def complaint(ended: Outcome, code: int = 2) -> str:
    """The one message on stderr; progress may stand before it."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    assert [line for line in lines if line.startswith("htcompress: ")] == lines[-1:]
    assert all(line.endswith(" ...") or line.startswith("note: ") for line in lines[:-1]), ended.err
    message = lines[-1].removeprefix("htcompress: ")
    assert message.endswith((".", "?"))
    assert len(message) < 700
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint and its task."""
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    return tmp_path


def fails(htc: Command, folder: Path, arguments: tuple[str, ...], words: tuple[str, ...], code: int = 2) -> str:
    before = listing(folder)
    message = complaint(htc(*arguments), code)
    for word in words:
        assert word in message
    assert {n: b for n, b in listing(folder).items() if "__pycache__" not in n} == before
    return message


# ---- checkpoints --------------------------------------------------------------------------------------------


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch marker",)


def changed(**tensors: Tensor | None) -> Prepare:
    return lambda folder: save_tagger(folder / "bad.pt", **tensors)


def holding(value: Any) -> Prepare:
    return lambda folder: torch.save(value, folder / "bad.pt")


def containing(content: bytes) -> Prepare:
    return lambda folder: (folder / "bad.pt").write_bytes(content)


def torchscript(folder: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "bad.pt")


def truncated(folder: Path) -> None:
    (folder / "bad.pt").write_bytes((folder / "model.pt").read_bytes()[:-700])


NAN = torch.full((32, 24), float("nan"))
CHECKPOINTS: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "missing": (lambda folder: None, ("There is no file bad.pt", "Give the path of a trained checkpoint")),
    "empty": (containing(b""), ("bad.pt is empty (0 bytes)", "Save it again")),
    "truncated": (truncated, ("bad.pt is not a readable torch checkpoint", "cut short", "Save one with")),
    "noise": (containing(bytes(range(256)) * 9), ("bad.pt is not a readable torch checkpoint", "another format")),
    "text": (
        containing(b"epoch 1: loss 0.5\n"),
        ("bad.pt is not a readable torch checkpoint", "expected a state_dict"),
    ),
    "directory": (
        lambda folder: (folder / "bad.pt").mkdir(),
        ("bad.pt is a directory without", "expected a checkpoint file"),
    ),
    "no recurrent layers": (
        holding(nn.Linear(3, 3).state_dict()),
        ("bad.pt has no recurrent layers: none of its 2 tensors (weight, bias)", "compresses those layers"),
    ),
    "a whole module": (holding(nn.Linear(3, 3)), ("bad.pt has no recurrent layers: none of its 2 tensors",)),
    "a payload": (holding(Payload()), ("bad.pt holds pickled Python objects", "could run code")),
    "nan": (
        changed(rnn__weight_ih_l0=NAN),
        ("rnn.weight_ih_l0 has 768 of 768 values that are NaN", "earlier checkpoint"),
    ),
    "torchscript": (torchscript, ("bad.pt has no recurrent layers",)),
    "integers": (changed(rnn__weight_hh_l0=torch.ones(32, 8).int()), ("holds torch.int32", "before it is quantised")),
    "a tensor is lacking": (changed(rnn__weight_hh_l0=None), ("bad.pt lacks rnn.weight_hh_l0", "saved whole?")),
    "a bias is lacking": (changed(rnn__bias_ih_l0=None), ("bad.pt lacks rnn.bias_ih_l0", "saved whole?")),
    "sizes that differ": (changed(rnn__bias_ih_l0=torch.zeros(31)), ("has shape (31,); expected (32,)",)),
    "a list": (holding([1, 2]), ("bad.pt holds list; expected a state_dict", "Save one with")),
    "another key": (holding({"net": {"w": 0.5}}), ("a dict with keys net", "under one of state_dict")),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("command", ["convert", "inspect"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(htc: Command, folder: Path, case: str, command: str) -> None:
    prepare, words = CHECKPOINTS[case]
    prepare(folder)
    rest = ("--budget", "400", *FAST) if command == "convert" else ()
    fails(htc, folder, (command, "bad.pt", *rest), words)
    assert not (folder / "marker").exists()


# ---- options ------------------------------------------------------------------------------------------------


OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("convert needs a goal: --budget N", "--error E", "--ratio R"),
    ("--budget", "400", "--ratio", "3"): ("needs exactly one goal", "found budget and ratio"),
    ("--budget", "400", "--error", ".1", "--ratio", "3"): ("found budget and error and ratio",),
    ("--budget", "x"): ("--budget is a whole number such as 5000, 5k, 1.5m or 20kB; found 'x'",),
    ("--budget", ""): ("--budget is a whole number", "found ''"),
    ("--budget", "1.5"): ("--budget is a whole number", "found '1.5'"),
    ("--budget", "nan"): ("--budget is a whole number", "found 'nan'"),
    ("--budget", "-5"): ("The budget is a number of parameters, at least 1; found -5",),
    ("--budget", "0B"): ("The budget is a number of bytes, at least 1; found 0",),
    ("--budget", "20kB", "--bits", "9"): ("Numbers are stored in 32, 16, 8, 7, 6, 5, 4, 3 or 2 bits; found 9",),
    ("--error", ".1", "--bits", "4"): ("An error is kept by matrices in 32 or 16 bits",),
    ("--budget", "0"): ("at least 1; found 0",),
    ("--error", "-0.1"): ("at least 0 and below 1 (such as 0.1); found -0.1",),
    ("--error", "2"): ("at least 0 and below 1 (such as 0.1); found 2.0",),
    ("--error", "nan"): ("--error is a number such as 0.1; found 'nan'",),
    ("--error", "ten"): ("--error is a number such as 0.1; found 'ten'",),
    ("--ratio", "0.5"): ("at least 1 (such as 100); found 0.5",),
    ("--ratio", "inf"): ("--ratio is a number such as 100; found 'inf'",),
    ("--ratio", "0"): ("at least 1 (such as 100); found 0.0",),
    ("--budget", "400", "--scope", "all"): ("--scope is one of auto, integrated, separate, input; found 'all'",),
    ("--budget", "400", "--layout", "tt"): ("--layout is one of auto, split, paired, svd; found 'tt'",),
    ("--budget", "400", "--format", "cp"): ("--format is one of ht, tt, tr, bt, svd, dense; found 'cp'",),
    ("--budget", "400", "--layers", "lstm*"): ("--layers 'lstm*' matches none of the recurrent layers: 'rnn'",),
    ("--budget", "400", "--layers", ""): ("--layers '' matches none of the recurrent layers",),
    ("--budget", "400", "--steps", "many"): ("--steps is a whole number such as 400 or 1k; found 'many'",),
    ("--budget", "400", "--time-limit", "soon"): ("--time-limit is a number such as 60; found 'soon'",),
    ("--budget", "400", "--time-limit", "0"): ("--time-limit is a number of seconds, above 0; found 0",),
    ("--budget", "400", "--epochs", "0"): ("--epochs is a number of passes over the training data, above 0; found 0",),
    ("--budget", "400", "--epochs", "ten"): ("--epochs is a number such as 3; found 'ten'",),
    ("--budget", "400", "--epochs", "2", "--steps", "9"): ("--steps and --epochs both say how long", "leave out one"),
    ("--budget", "400", "--steps", "-1"): ("--steps is a number of steps, at least 0; found -1",),
    ("--budget", "400", "--seed", "x"): ("Invalid value for '--seed'", "See htcompress convert --help"),
    ("--budget", "400", "--device", "gpu0"): ("The device 'gpu0' is not there", "Try cpu"),
    ("--budget", "400", "--bogus"): ("No such option: --bogus", "See htcompress convert --help"),
    ("--budget",): ("Option '--budget' requires an argument", "See htcompress"),
    ("--budget", "400", "surplus"): ("surplus", "See htcompress convert --help"),
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options(htc: Command, folder: Path, options: tuple[str, ...]) -> None:
    layout = () if "--layout" in options else ("--layout", "svd")
    fails(htc, folder, ("convert", "model.pt", "-o", "out", *layout, *options), OPTIONS[options])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bogus",), ("No such command 'bogus'", "See htcompress --help")),
        (("--bogus",), ("No such option: --bogus", "See htcompress --help")),
        (("convert",), ("Missing argument 'CKPT'", "See htcompress convert --help")),
        (("evaluate", "model.pt"), ("evaluate needs --task TASK",)),
        (("finetune", "out"), ("finetune needs --task TASK",)),
        (("inspect", "model.pt", "--layers", "x"), ("--layers 'x' matches none",)),
        (("finetune", "out", "--task", "task.py"), ("There is no directory out", "htcompress convert")),
        (("finetune", "model.pt", "--task", "task.py"), ("model.pt is not an output directory of htcompress",)),
        (("evaluate", "out", "--task", "task.py"), ("There is no file out",)),
        (("evaluate", ".", "--task", "task.py"), (". is not an output directory of htcompress",)),
    ],
)
def test_commands(htc: Command, folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    fails(htc, folder, arguments, words)


def test_no_command_shows_the_help(htc: Command, folder: Path) -> None:
    before = listing(folder)
    ended = htc()
    assert (ended.code, ended.out) == (2, "")
    assert "Usage: htcompress" in ended.err
    assert "convert" in ended.err
    assert listing(folder) == before


# ---- goals out of reach -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--budget", "3"),
        ("--ratio", "500"),
        ("--budget", "3", "--scope", "separate"),
        ("--budget", "3", "--scope", "input"),
        ("--budget", "3", "--scope", "integrated", "--task", "task.py", "--no-finetune"),
    ],
    ids=" ".join,
)
def test_the_smallest_budget_that_works_is_named_and_works(
    htc: Command, folder: Path, options: tuple[str, ...]
) -> None:
    message = fails(htc, folder, ("convert", "model.pt", *FAST, *options), ("cannot be reached",), code=3)
    found = re.search(r"at least (\d+)", message)
    assert found
    ended = htc("convert", "model.pt", *FAST, "--budget", found[1], *options[2:])
    assert ended.code == 0
    assert (folder / "out" / "model.safetensors").is_file()


# ---- tasks --------------------------------------------------------------------------------------------------


TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "syntax": ("def broken(:", ("The task task.py has a syntax error in line ", "Correct it")),
    "raises at import": ("1 / 0", ("failed while it was imported: ZeroDivisionError", "(line ")),
    "exits at import": ("raise SystemExit(0)", ("failed while it was imported: SystemExit: 0",)),
    "no model": ("del model", ("The task task.py lacks model(), which every command needs", "Define a function")),
    "model is no module": ("def model(): return 3", ("model() in task.py returned int; expected a torch.nn.Module",)),
    "model raises": ("def model(): raise OSError('gone')", ("model() in task.py raised OSError: gone (line ",)),
    "model exits": ("def model(): raise SystemExit(0)", ("model() in task.py raised SystemExit: 0 (line ",)),
    "missing keys": (
        "def model():\n    made = Tagger()\n    made.tail = nn.Linear(2, 2)\n    return made",
        ("model.pt lacks 2 of the 8 tensors of model() in task.py: tail.weight, tail.bias", "or correct model()"),
    ),
    "other shapes": (
        "def model():\n    made = Tagger()\n    made.head = nn.Linear(8, 4)\n    return made",
        ("head.weight has shape (3, 8); model() in task.py has (4, 8)", "or correct model()"),
    ),
    "no recurrent layers in the model": (
        "def model(): return nn.ModuleDict({'head': nn.Linear(8, 3)})",
        ("The model has no recurrent layers",),
    ),
    "calibration empty": ("def calibration(): return []", ("calibration() yields nothing",)),
    "calibration none": ("def calibration(): pass", ("calibration() in task.py returned NoneType", "Yield them")),
    "calibration raises": (
        "def calibration():\n    yield torch.zeros(1, 5, 24)\n    raise EOFError",
        ("calibration() in task.py raised EOFError (line ", "--debug shows the traceback"),
    ),
    "calibration does not fit": (
        "def calibration(): yield torch.zeros(1, 5, 3)",
        ("The model cannot take a batch of calibration() ((1, 5, 3))", "correct the task"),
    ),
    "calibration yields targets": (
        "def calibration(): yield from batches(1, 2)",
        ("The model cannot take a batch of calibration() ((8, 5, 24), (8,))", "A tuple is the model's positional"),
    ),
    "training with one batch": (
        "def training(): return batches(1, 1)",
        ("Fine-tuning needs at least two batches", "what there is to train on has 1", "--no-finetune"),
    ),
    "training raises": (
        "def training(): raise ValueError('x')",
        ("training() in task.py raised ValueError: x (line ",),
    ),
    "training runs out": (
        "ONCE = batches(1, 5)\ndef training(): return ONCE",
        ("Fine-tuning ran out of data", "training() yields 0 batches", "start a new pass"),
    ),
    "unlabelled is empty": ("def unlabelled(): return []", ("unlabelled() yields nothing",)),
    "unlabelled does not fit": (
        "def unlabelled(): yield torch.zeros(2, 3)",
        ("The model cannot take a batch of unlabelled() ((2, 3))",),
    ),
    "loss raises": (
        "def loss(output, target): raise KeyError('y')",
        ("loss() in task.py raised KeyError: 'y' (line ",),
    ),
    "loss is no number": (
        "def loss(output, target): return output",
        ("loss(output, target) returned a tensor of shape",),
    ),
    "evaluate raises": (
        "def evaluate(model): raise ValueError('x')",
        ("evaluate() in task.py raised ValueError: x (line ",),
    ),
    **{
        f"evaluate returns {value}": (
            f"def evaluate(model): return {value}",
            ("evaluate(model) in task.py returned ", "expected a float, or a dict of floats"),
        )
        for value in ("'good'", "None", "{}", "torch.zeros(3)", "{'a': 'b'}")
    },
    "evaluate returns nan": (
        "def evaluate(model): return float('nan')",
        ("evaluate(model) gave metric nan for the dense model", "expected finite numbers"),
    ),
}


@pytest.mark.parametrize("case", TASKS)
def test_tasks(htc: Command, folder: Path, case: str) -> None:
    text, words = TASKS[case]
    write_task(folder / "task.py", text)
    fails(htc, folder, WITH_TASK, words)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("none.py", "There is no task file none.py"),
        ("no_such_module", "There is no module no_such_module"),
        ("model.pt", "model.pt is not a Python file"),
    ],
)
def test_no_task(htc: Command, folder: Path, task: str, words: str) -> None:
    fails(htc, folder, (*CONVERT, "--task", task), (words, "Give a Python file (task.py) or a module (package.module)"))


@pytest.mark.parametrize("case", ["evaluate raises", "evaluate returns None", "missing keys"])
def test_tasks_of_evaluate(htc: Command, folder: Path, case: str) -> None:
    text, words = TASKS[case]
    write_task(folder / "task.py", text)
    fails(htc, folder, ("evaluate", "model.pt", "--task", "task.py"), words)


def test_evaluate_needs_evaluate(htc: Command, folder: Path) -> None:
    write_task(folder / "task.py", "del evaluate")
    arguments = ("evaluate", "model.pt", "--task", "task.py")
    fails(htc, folder, arguments, ("The task task.py lacks evaluate(), which evaluation needs",))


def test_finetune_of_a_directory_that_lost_its_teacher(htc: Command, folder: Path) -> None:
    assert htc(*CONVERT).code == 0
    (folder / "model.pt").unlink()
    write_task(folder / "task.py", "del loss")
    arguments = ("finetune", "out", "--task", "task.py")
    fails(
        htc, folder, arguments, ("The dense checkpoint model.pt that out was made from is not found", "with --teacher")
    )


def test_finetune_of_a_damaged_directory(htc: Command, folder: Path) -> None:
    assert htc(*CONVERT).code == 0
    (folder / "out" / "report.json").write_text("{}")
    arguments = ("finetune", "out", "--task", "task.py")
    fails(htc, folder, arguments, ("report.json has the schema null", "Convert the model again"))
    (folder / "out" / "report.json").unlink()
    fails(htc, folder, arguments, ("out has no report.json",))


def test_keys_that_the_model_does_not_know_are_a_note(htc: Command, folder: Path) -> None:
    save_tagger(folder / "model.pt", ema=torch.zeros(2))
    ended = htc(*CONVERT, "--task", "task.py", "--no-finetune", "--json")
    assert ended.code == 0
    assert "note: 1 tensors of model.pt are unknown to model(): ema." in ended.err.splitlines()


# ---- where to write -----------------------------------------------------------------------------------------


def foreign(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")


@pytest.mark.parametrize(
    ("place", "prepare", "words"),
    [
        ("task.py", lambda folder: None, ("The output task.py is a file; give a directory with -o",)),
        ("task.py/out", lambda folder: None, ("task.py is a file, so the output task.py/out cannot be in it",)),
        ("out", foreign, ("out exists and is not one of htcompress, so it is left as it is", "another with -o")),
        (".", lambda folder: None, ("is not one of htcompress, so it is left as it is",)),
        ("..", lambda folder: None, ("is not one of htcompress, so it is left as it is",)),
        ("/", lambda folder: None, ("/ exists and is not one of htcompress",)),
    ],
)
def test_places(htc: Command, folder: Path, place: str, prepare: Prepare, words: tuple[str, ...]) -> None:
    prepare(folder)
    # Found out before any work: the checkpoint is not even looked for.
    fails(htc, folder, ("convert", "none.pt", "--budget", "400", "-o", place), words)


def test_a_folder_that_cannot_be_written_to(htc: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    fails(htc, folder, CONVERT, ("cannot be written to; give another output directory with -o",))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(htc: Command, folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o555)
    words = ("locked cannot be written to; give another output directory with -o",)
    fails(htc, folder, ("convert", "model.pt", "--budget", "400", "--layout", "svd", "-o", "locked/out"), words)


# ---- faults of our own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("odd"), MemoryError(), AssertionError(), KeyError("x")])
def test_the_unexpected_is_told_without_a_traceback(
    htc: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(compression, "converted", broken)
    words = (f"unexpected {type(error).__name__}", "--debug shows the traceback")
    fails(htc, folder, CONVERT, words)
    ended = htc(*CONVERT, "--debug")
    assert ended.code == 2
    assert "Traceback (most recent call last)" in ended.err
    assert ended.err.splitlines()[-1].startswith("htcompress: unexpected")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("convert", "none.pt", "--budget", "5"), 2, "There is no file none.pt"),
        (("convert", "model.pt", "--budget", "3", *FAST), 3, "cannot be reached"),
        ((*WITH_TASK, "--bogus"), 2, "No such option: --bogus"),
    ],
)
def test_debug_shows_the_traceback_and_keeps_the_code(
    htc: Command, folder: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    ended = htc(*arguments, "--debug")
    assert ended.code == code
    assert "Traceback (most recent call last)" in ended.err
    assert words in ended.err.splitlines()[-1]


def test_debug_shows_the_line_of_the_task(htc: Command, folder: Path) -> None:
    write_task(folder / "task.py", "def evaluate(model):\n    return undefined_name")
    ended = htc(*WITH_TASK, "--debug")
    assert ended.code == 2
    assert "return undefined_name" in ended.err


# ---- the installed command ----------------------------------------------------------------------------------


HTCOMPRESS = Path(sys.executable).with_name("htcompress")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def installed(folder: Path, *arguments: str, **options: Any) -> Outcome:
    command = [str(HTCOMPRESS), *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, text=True, capture_output=True, timeout=120, check=False, **options
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("convert", "none.pt", "--budget", "400"), 2, "There is no file none.pt"),
        pytest.param(
            ("convert", "evil.pt", "--budget", "400", *FAST), 2, "holds pickled Python objects", marks=pytest.mark.full
        ),
        (("convert", "model.pt", "--budget", "3", *FAST), 3, "cannot be reached"),
        (("bogus",), 2, "No such command 'bogus'"),
    ],
)
def test_the_installed_command(folder: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    torch.save({"state_dict": Tagger().state_dict(), "extra": Payload()}, folder / "evil.pt")
    before = listing(folder)
    assert words in complaint(installed(folder, *arguments), code)
    assert listing(folder) == before


def test_a_full_disk(folder: Path) -> None:
    resource = pytest.importorskip("resource")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    before = listing(folder)
    message = complaint(installed(folder, *CONVERT, preexec_fn=limited))
    assert "out cannot be written" in message
    assert listing(folder) == before


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    command = f"'{HTCOMPRESS}' inspect model.pt; echo code $? >&2"
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        assert process.stderr is not None
        assert process.stderr.read() == "code 0\n"


def test_letters_that_the_terminal_does_not_know_are_no_error(folder: Path) -> None:
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [str(HTCOMPRESS), "inspect", "model.pt"], cwd=folder, env=environment, capture_output=True, check=False
    )
    assert ended.returncode == 0
    assert b"rnn" in ended.stdout
    assert ended.stderr == b""

"""Several processes fine-tune as one: `finetune` by the command line, in processes that are joined by gloo.

One program loads everything once and forks the processes of every scenario, as a launcher would start them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crossing import FULL
from oracles import distance
from safetensors.torch import load_file
from small import Outcome, save_tagger, write_task

import htcompress
from htcompress.errors import RequestError
from htcompress.finetuning.together import Alone, joined
from htcompress.request import Goal
from htcompress.vocabulary import LayoutKind

PROGRAM = '''
import json, os, signal, socket, sys
import torch
torch.set_num_threads(1)
import accelerate, accelerate.utils, matplotlib.backends.backend_svg, matplotlib.figure, torch._dynamo, typer.main
import htcompress.conversion, htcompress.report.html, htcompress.report.terminal, htcompress_cli.commands
from htcompress import stages
from htcompress_cli import main

plain, step = stages.distill, torch.optim.AdamW.step


def child(scenario, rank):
    """One process: its curve goes to a file, and at some step of the optimiser it may be killed."""
    name, count, left = scenario["name"], scenario["processes"], [scenario["kill"].get(str(rank), 0)]
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT), stream)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(scenario["port"])}

    def watched(*arguments, **named):
        history = plain(*arguments, **named)
        with open(f"{name}.{rank}.curve", "w") as file:
            json.dump([[p.step, p.loss, p.best] for p in history], file)
        return history

    def counted(self, *arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **named)

    stages.distill, torch.optim.AdamW.step = watched, counted
    sys.argv = ["htcompress", "finetune", *scenario["command"]]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    main.run()


for scenario in json.loads(sys.argv[1]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        scenario["port"] = free.getsockname()[1]
    processes = []
    for rank in range(scenario["processes"]):
        processes.append(os.fork())
        if processes[-1] == 0:
            try:
                child(scenario, rank)
            except SystemExit as end:
                os._exit(end.code)
            finally:
                os._exit(99)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    print(json.dumps([scenario["name"], codes]), flush=True)
'''

ONE_FAILS = """
def training():
    import os
    for i, item in enumerate(batches(2, 40)):
        if i == 14 and os.environ.get("RANK") == "1":
            raise ValueError("the disk is on fire")
        yield item
"""

DOUBLED = """
def training():
    items = list(batches(2, 40))
    return [tuple(torch.cat(parts) for parts in zip(*items[i : i + 2])) for i in range(0, 40, 2)]
"""

TASKS = {
    "task": "def training():\n    return batches(2, 40)",
    "doubled": DOUBLED,
    "fails": ONE_FAILS,
    "others": "def training():\n    import os\n    return batches(2 + int(os.environ.get('RANK', 0)), 40)",
    "measures": "def evaluate(model):\n    raise ValueError('there is no metric today')",
}


def scenario(
    name: str, *options: str, on: str | None = None, task: str = "task", processes: int = 2, kill: Any = None
) -> dict[str, Any]:
    """Processes that fine-tune the directory `on`, each of which may be killed at a step of the optimiser."""
    common = ("--teacher", "model.pt", "--steps", "30", "--json", "--task", f"{task}.py")
    command = [on or name, *common, *options]
    return {"name": name, "command": command, "processes": processes, "kill": kill or {}}


KEEP = ("--checkpoint-every", "7")
SCENARIOS = [
    scenario("doubled", task="doubled", processes=1),
    scenario("two"),
    scenario("plain", processes=1),
    scenario("killed", *KEEP, processes=1, kill={0: 24}),
    scenario("resumed", *KEEP, "--resume", on="killed", processes=1),
    scenario("fails", task="fails"),
]
FURTHER = [
    scenario("one-dies", *KEEP, kill={1: 16}),
    scenario("not-anew", *KEEP, on="one-dies"),
    scenario("first-dies", *KEEP, "--resume", on="one-dies", kill={0: 9}),
    scenario("two-resumed", *KEEP, "--resume", on="one-dies"),
    scenario("fewer", *KEEP, kill={0: 16, 1: 16}),
    scenario("fewer-resumed", "--resume", "--accumulate", "2", on="fewer", processes=1),
    scenario("others", task="others"),
    scenario("measures", task="measures"),
    scenario("usage", "--stepz", "3"),
    scenario("request", "--accumulate", "none"),
]
if FULL:
    SCENARIOS += FURTHER


class Ran:
    """What came of the scenarios."""

    def __init__(self, place: Path, codes: dict[str, list[int]]) -> None:
        self.place, self.codes = place, codes

    def text(self, name: str, rank: int, kind: str) -> str:
        return (self.place / f"{name}.{rank}.{kind}").read_text(encoding="utf-8")

    def curve(self, name: str, rank: int = 0) -> list[list[float]]:
        found: list[list[float]] = json.loads(self.text(name, rank, "curve"))
        return found

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.place / name / "model.safetensors")

    def messages(self, name: str) -> list[str]:
        """The errors that all processes told."""
        ranks = range(len(self.codes[name]))
        lines = [line for rank in ranks for line in self.text(name, rank, "err").splitlines()]
        return [line for line in lines if line.startswith("htcompress: ")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    pytest.importorskip("accelerate")
    place = tmp_path_factory.mktemp("together")
    checkpoint = save_tagger(place / "model.pt")
    for name, added in TASKS.items():
        write_task(place / f"{name}.py", added)
    made = htcompress.convert(checkpoint, goal=Goal(budget=400, layout=LayoutKind.SVD))
    htcompress.save(made, place / "out")
    for name in {one["command"][0] for one in SCENARIOS}:
        shutil.copytree(place / "out", place / name)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(SCENARIOS)],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Ran(place, dict(json.loads(line) for line in done.stdout.splitlines()))


def test_two_processes_train_as_one_with_batches_twice_as_large(ran: Ran) -> None:
    assert ran.codes["two"] == [0, 0], ran.messages("two")
    one, two = ran.curve("doubled"), ran.curve("two")
    assert [look[0] for look in two] == [look[0] for look in one] == [0, 25, 30]
    assert [look[1] for look in two] == pytest.approx([look[1] for look in one], abs=1e-4)
    assert one[0][1] - one[-1][1] > 0.01
    before, expected, found = ran.weights("out"), ran.weights("doubled"), ran.weights("two")
    for name, tensor in expected.items():
        assert distance(found[name], tensor) < 1e-3 * distance(before[name], tensor) + 1e-6, name


def test_only_the_first_process_tells_and_writes(ran: Ran) -> None:
    assert ran.curve("two", 0) == ran.curve("two", 1)
    assert json.loads(ran.text("two", 0, "out"))["quality"]["finetuned"] is not None
    assert (ran.text("two", 1, "out"), ran.text("two", 1, "err")) == ("", "")


def test_a_killed_run_goes_on_and_ends_at_the_same_weights(ran: Ran) -> None:
    assert ran.codes["killed"] == [-9]
    assert ran.codes["resumed"] == [0]
    assert "Going on from step 21 of 30" in ran.text("resumed", 0, "err")
    assert ran.curve("resumed") == ran.curve("plain")
    same(ran.weights("killed"), ran.weights("plain"))
    assert not (ran.place / "killed-checkpoint").exists()


@pytest.mark.full
def test_a_process_that_dies_ends_all_and_all_go_on_together(ran: Ran) -> None:
    assert ran.codes["one-dies"] == [2, -9]
    assert "another process of this run has ended without a word" in ran.messages("one-dies")[0]
    assert ran.codes["not-anew"] == [2, 2]
    (message,) = ran.messages("not-anew")
    assert "of a run that has not ended. Go on with --resume" in message
    assert ran.codes["first-dies"] == [-9, 2]
    assert ran.codes["two-resumed"] == [0, 0]
    assert ran.curve("two-resumed") == ran.curve("two")
    same(ran.weights("one-dies"), ran.weights("two"))


@pytest.mark.full
def test_fewer_processes_go_on_where_each_takes_more(ran: Ran) -> None:
    assert ran.codes["fewer-resumed"] == [0], ran.messages("fewer-resumed")
    losses = [[look[1] for look in ran.curve(name)] for name in ("fewer-resumed", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", r"in process 1 of 2: training\(\) in fails.py raised ValueError: the disk is on fire"),
        pytest.param(
            "others", r"training\(\) yields other batches in process 1 than in process 0", marks=pytest.mark.full
        ),
        pytest.param(
            "measures",
            r"evaluate\(\) in measures.py raised ValueError: there is no metric today",
            marks=pytest.mark.full,
        ),
        pytest.param("usage", "No such option: --stepz", marks=pytest.mark.full),
        pytest.param("request", "--accumulate is a whole number such as 4; found 'none'", marks=pytest.mark.full),
    ],
)
def test_an_error_ends_all_with_one_message(ran: Ran, name: str, words: str) -> None:
    assert ran.codes[name] == [2, 2]
    (message,) = ran.messages(name)
    assert re.search(words, message)
    same(ran.weights(name), ran.weights("out"))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- one process --------------------------------------------------------------------------------------------


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        with joined() as together:
            assert isinstance(together, Alone)
    assert together.gather(3) == [3]
    assert together.of_first(lambda: 4) == 4
    assert together.device("cuda:1") == "cuda:1"


def test_accelerate_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RequestError, match=r"one of 2 processes .* pip install 'htcompress\[accelerate\]'"), joined():
        pass


def test_fine_tuning_alone_does_without_accelerate(htc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, task = save_tagger(tmp_path / "model.pt"), write_task(tmp_path / "task.py")
    htcompress.save(htcompress.convert(checkpoint, goal=Goal(budget=400, layout=LayoutKind.SVD)), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    options = ("--accumulate", "2", "--mixed-precision", "bf16", "--checkpoint-every", "1", "--resume")
    found: Outcome = htc("finetune", tmp_path / "out", "--task", task, "--steps", "2", *options)
    assert found.code == 0, found.err
    assert "There is no checkpoint in" in found.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--accumulate", "0"), "--accumulate is a number of batches, at least 1; found 0"),
        (("--mixed-precision", "fp16"), "mixed precision of no or bf16; found 'fp16'"),
        (("--checkpoint-every", "0"), "--checkpoint-every is a number of steps, at least 1; found 0"),
        (("--checkpoint", "there"), "--checkpoint there says where; give --checkpoint-every STEPS or --resume, too"),
    ],
)
def test_options_that_make_no_sense(htc: Any, options: tuple[str, ...], words: str) -> None:
    found: Outcome = htc("finetune", "out", "--task", "task.py", *options)
    assert found.code == 2
    assert words in found.err

"""Commands stopped at random moments: the target holds the old whole output or the new one, and nothing else stays.

    python benchmarks/robustness/interruptions.py > benchmarks/results/interruptions.txt

Each command runs many times in children with everything imported, over an older output and without one, and is hit at
a random moment by SIGINT (the whole group, as a terminal does), SIGTERM, SIGKILL, or a disk that is full: a tmpfs of
random size where this may mount one, files of limited length where not. What is looked at afterwards: the exit code,
the target, files beside it, temporary files, processes, tracebacks. After SIGKILL what is left is counted, and the same
command, run again, has to end well and clear it away. A study has to go on when it is started again.

Exits with 1 where anything was wrong. `--seed` makes the moments; `--only convert` and the like choose commands.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
# ruff: noqa: E402 - threads are set before torch is imported

import torch

torch.set_num_threads(1)

# Everything slow, so that the moments fall into the work.
import joblib.externals.loky
import onnx
import onnxruntime
import onnxscript
import safetensors.torch
import torch._dynamo
import torch.onnx
import typer.main
from htcompress_cli import commands, main
from small import Tagger, listing, save_tagger, tagger, write_task

import htcompress.compression
import htcompress.continuing
import htcompress.exporting.layer
import htcompress.exporting.model
import htcompress.report.html
import htcompress.report.terminal
import htcompress.study.run
from htcompress.directory.read import load
from htcompress.report import read_report

WARM = (
    joblib.externals.loky,
    onnx,
    onnxscript,
    safetensors.torch,
    torch._dynamo,
    torch.onnx,
    typer.main,
    commands,
    htcompress.study.run,
)
PATIENCE = 20.0
"""Seconds that children of a stopped command may take to end, and a command that hangs to count as one."""


@dataclass(frozen=True)
class Case:
    """A command, what stands before it, and what a whole output is."""

    name: str
    command: tuple[str, ...]
    target: str
    whole: Callable[[Path], None]
    older: tuple[str, ...] | None = None
    """What makes the older output that stands in the target's place."""
    again: tuple[str, ...] = ()
    """Options for the run after: those of the command by default."""


def whole_directory(place: Path) -> None:
    """Raise where this is no whole output directory."""
    names = {path.name for path in place.iterdir()}
    expected = {"model.safetensors", "config.json", "report.json", "report.md", "report.html", "README.md"}
    if names != expected:
        raise ValueError(f"holds {sorted(names)}")
    read_report(place)
    load(place, tagger())


def whole_study(place: Path) -> None:
    """Raise where a study's points are not whole; the study itself is written last."""
    for path in place.iterdir():
        if path.name == "points":
            for point in path.iterdir():
                if point.is_dir():
                    whole_directory(point)
                else:
                    json.loads(point.read_text())
        elif path.name == "study.json":
            json.loads(path.read_text())
        elif path.name not in ("study.md", "study.html"):
            raise ValueError(f"holds {path.name}")


def whole_weights(file: Path) -> None:
    """Raise where this is no state_dict of the model."""
    Tagger().load_state_dict(torch.load(file), strict=True)


def whole_onnx(file: Path) -> None:
    """Raise where onnxruntime cannot load it."""
    onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])


CONVERT = ("convert", "model.pt", "--layout", "svd", "-o", "made/out", "--task", "task.py", "--steps", "40", "--budget")
SWEEP = ("sweep", "model.pt", "--budgets", "300,420", "--task", "task.py", "--steps", "20", "-o", "made/out", "--jobs")
EXPORT = ("export", "converted", "--to")
OLD = ("--no-finetune",)
CASES = (
    Case("convert", (*CONVERT, "400"), "made/out", whole_directory),
    Case("convert over", (*CONVERT, "400"), "made/out", whole_directory, older=(*CONVERT, "300", *OLD)),
    Case(
        "finetune",
        ("finetune", "made/out", "--task", "task.py", "--steps", "40"),
        "made/out",
        whole_directory,
        older=(*CONVERT, "300", *OLD),
    ),
    Case("sweep --jobs 1", (*SWEEP, "1"), "made/out", whole_study),
    Case("sweep --jobs 2", (*SWEEP, "2"), "made/out", whole_study, again=(*SWEEP, "1")),
    Case(
        "export dense",
        (*EXPORT, "dense", "made/model.pt"),
        "made/model.pt",
        whole_weights,
        older=(*EXPORT, "dense", "made/model.pt"),
    ),
    Case(
        "export onnx",
        (*EXPORT, "onnx", "made/model.onnx", "--task", "task.py"),
        "made/model.onnx",
        whole_onnx,
        older=(*EXPORT, "onnx", "made/model.onnx"),
    ),
)
WAYS = ("SIGINT", "SIGTERM", "SIGKILL", "full disk")


@dataclass
class Found:
    """What came of the runs of one command and one way to stop it."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)


class Child:
    """A command in a child of its own: its own session, folder for temporary files, output."""

    def __init__(self, folder: Path, command: tuple[str, ...], limit: int | None = None) -> None:
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        for name in ("stdout", "stderr"):  # a child may be stopped before it has opened them
            (folder / name).touch()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                code = self._work(command, limit)
            except KeyboardInterrupt:  # before the command line was there to say so
                code = 130
            finally:
                os._exit(code)

    def _work(self, command: tuple[str, ...], limit: int | None) -> int:
        """Run the command as a process of its own would; its exit code."""
        os.setsid()
        os.chdir(self.folder)
        # Whoever started this may ignore SIGINT: a shell does for a job in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ |= {"TMPDIR": str(self.temporary), "JOBLIB_TEMP_FOLDER": str(self.temporary)}
        tempfile.tempdir = None
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["htcompress", *command]
        try:
            main.run()
        except SystemExit as ended:
            sys.stdout.flush(), sys.stderr.flush()
            return int(ended.code or 0)
        return 0

    def wait(self) -> int:
        """The exit code, negative for a signal; a command that hangs is killed, and gives 98."""
        until = time.monotonic() + 6 * PATIENCE
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return 98

    def orphans(self) -> list[int]:
        """Processes of the session that still run after a while."""
        until = time.monotonic() + PATIENCE
        while (running := _session(self.pid)) and time.monotonic() < until:
            time.sleep(0.02)
        return running

    @property
    def errors(self) -> str:
        """What it said."""
        return (self.folder / "stderr").read_text(errors="replace")


def _session(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


class Trial:
    """One command, stopped at many moments, in one way after the other."""

    def __init__(self, case: Case, base: Path, mounts: bool) -> None:
        self.case, self.base, self.mounts = case, base, mounts
        self.way, self.found = "", Found()

    def prepared(self, index: int | str) -> Path:
        """A folder with what the command needs, and the older output."""
        folder = self.base / str(index)
        shutil.copytree(self.base / "ready", folder)
        return folder

    def ready(self) -> None:
        """Make what all runs start from, and find out how long a whole one takes and how much it writes."""
        folder = self.base / "ready"
        folder.mkdir(parents=True)
        save_tagger(folder / "model.pt")
        write_task(folder / "task.py")
        (folder / "made").mkdir()
        steps = [(*CONVERT[:5], "converted", *CONVERT[6:], "350", *OLD), self.case.older]
        for step in filter(None, steps):
            child = Child(folder, step)
            if child.wait():
                raise RuntimeError(child.errors)
        shutil.rmtree(folder / "tmp")
        whole = self.prepared("whole")
        began = time.monotonic()
        child = Child(whole, self.case.command)
        if child.wait():
            raise RuntimeError(child.errors)
        self.seconds = time.monotonic() - began
        print(f"{self.case.name}: {self.seconds:.1f} s undisturbed", file=sys.stderr, flush=True)
        self.bytes = max(1, sum(len(data) for data in listing(whole / "made").values()))
        shutil.rmtree(whole)

    def run(self, index: int, chance: random.Random) -> None:
        """One run, stopped at a moment."""
        folder = self.prepared(index)
        before = listing(folder / "made")
        part = chance.random()
        with self._disk(folder, part) as limit:
            child = Child(folder, self.case.command, limit)
            if self.way != "full disk":
                time.sleep(1.1 * self.seconds * part)
                number = signal.Signals[self.way]
                with suppress(ProcessLookupError):
                    (os.killpg if number is signal.SIGINT else os.kill)(child.pid, number)
            code = child.wait()
            self._look(folder, before, child, code, f"moment {part:.3f}")
        if self.way in ("SIGKILL", "full disk") or self.case.whole is whole_study:
            self._again(folder, index)
        shutil.rmtree(folder)

    @contextmanager
    def _disk(self, folder: Path, part: float) -> Iterator[int | None]:
        """The folder `made` on a disk that is full after a part of what the command writes; or a limit of each file."""
        if self.way != "full disk":
            yield None
            return
        if not self.mounts:
            yield int(part * self.bytes)
            return
        made, aside = folder / "made", folder / "aside"
        made.rename(aside)
        made.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", made], check=True)
        try:
            shutil.copytree(aside, made, dirs_exist_ok=True)
            used = shutil.disk_usage(made).used
            size = used + 4096 * int(part * 2 * self.bytes / 4096 + 1)
            subprocess.run(["mount", "-o", f"remount,size={size}", made], check=True)
            yield None
            shutil.rmtree(aside)
            shutil.copytree(made, aside)
        finally:
            subprocess.run(["umount", made], check=True)
            made.rmdir()
            aside.rename(made)

    def _look(self, folder: Path, before: dict[str, bytes], child: Child, code: int, where: str) -> None:
        found, errors = self.found, child.errors
        allowed = {"SIGINT": (0, 130), "SIGTERM": (0, 130), "SIGKILL": (0, -9), "full disk": (0, 2)}[self.way]
        found.counts["runs"] += 1
        found.counts["done" if code == 0 else "stopped"] += 1

        def fault(text: str) -> None:
            last = errors.strip().splitlines()[-1:] or [""]
            found.faults.append(f"{self.case.name}, {self.way}, {where}, code {code}: {text} | {last[0][:160]}")

        if code not in allowed:
            fault("unexpected exit code")
        if self.way != "SIGKILL" and ("Traceback" in errors or "Exception ignored" in errors):
            fault("a traceback: " + " / ".join(errors.strip().splitlines()[-12:])[:1500])
        if self.way == "full disk" and code and "cannot be written" not in errors:
            fault("what was full is not said")
        target, after = folder / self.case.target, listing(folder / "made")
        name = Path(self.case.target).name
        ours = {path for path in after if path.split("/")[0] == name}
        inner = {path for path in ours if self.case.whole is whole_study and re.search(r"\.(partial|old)$", path)}
        beside = sorted(path for path in after if "/" not in path and path != name) + sorted(inner)
        same = {path: after[path] for path in ours} == before
        found.counts["old whole" if same and before else "absent" if not target.exists() else "new whole"] += 1
        if not same and target.exists():
            try:
                if inner and self.way == "SIGKILL":
                    found.counts["new whole"] -= 1
                    found.counts["study in work"] += 1
                else:
                    self.case.whole(target)
            except Exception as error:
                fault(f"the target is not whole: {type(error).__name__}: {error}")
        if before and not target.exists() and self.way != "SIGKILL":
            fault("the old output is gone")
        if code == 0 and same and before and self.case.name != "export dense":
            fault("done, and the old output stands")
        orphans = child.orphans()
        temporary = sorted(str(p.relative_to(child.temporary)) for p in child.temporary.rglob("*"))
        for kind, things in (("beside", beside), ("temporary", temporary), ("processes", orphans)):
            if not things:
                continue
            found.left[kind] += 1
            if self.way != "SIGKILL":
                fault(f"{kind}: {things[:4]}")
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(child.temporary, ignore_errors=True)

    def _again(self, folder: Path, index: int) -> None:
        """The same command once more, undisturbed: it ends well, and what was left is gone."""
        child = Child(folder, self.case.again or self.case.command)
        code = child.wait()
        name = Path(self.case.target).name
        beside = [path.name for path in (folder / "made").iterdir() if path.name != name]
        try:
            if code:
                raise ValueError(f"code {code}: {child.errors.strip().splitlines()[-1:]}")
            self.case.whole(folder / self.case.target)
            if self.case.whole is whole_study:
                made = json.loads((folder / self.case.target / "study.json").read_text())
                if len(made["points"]) != 2:
                    raise ValueError(f"a study of {len(made['points'])} points")
            if beside:
                raise ValueError(f"{beside} is still there")
        except Exception as error:
            self.found.faults.append(
                f"{self.case.name}, {self.way}, run {index} again: {type(error).__name__}: {error}"
            )
        else:
            self.found.counts["again"] += 1


def may_mount(base: Path) -> bool:
    """Whether a tmpfs may be mounted here."""
    place = base / "mount"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True, capture_output=True)
        subprocess.run(["umount", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def study(moments: int, seed: int, only: list[str], ways: list[str]) -> int:
    """Run all, print as it comes; how many faults there were."""
    faults: list[str] = []
    columns = ("runs", "done", "stopped", "old whole", "new whole", "absent", "study in work", "again")
    with tempfile.TemporaryDirectory(prefix="interruptions-") as name:
        base = Path(name)
        mounts = may_mount(base)
        print(f"{moments} moments each, seed {seed}; full disk: {'a tmpfs' if mounts else 'files of limited length'}")
        print(f"{'command':16}{'stopped by':11}" + "".join(f"{c:>15}" for c in columns) + "  left over", flush=True)
        for case in CASES:
            if only and not any(case.name.startswith(chosen) for chosen in only):
                continue
            trial = Trial(case, base / case.name.replace(" ", "_"), mounts)
            trial.ready()
            for way in ways:
                trial.way, trial.found = way, Found()
                chance = random.Random(f"{seed} {case.name} {way}")
                for index in range(moments):
                    trial.run(index, chance)
                left = ", ".join(f"{kind} {count}" for kind, count in trial.found.left.items()) or "nothing"
                counts = "".join(f"{trial.found.counts[c]:>15}" for c in columns)
                print(f"{case.name:16}{way:11}{counts}  {left}", flush=True)
                faults += trial.found.faults
            shutil.rmtree(trial.base)
    print(f"{len(faults)} faults")
    for text in faults:
        print(f"  {text}")
    return len(faults)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    chosen = parser.parse_args()
    sys.exit(bool(study(chosen.moments, chosen.seed, chosen.only, chosen.ways)))

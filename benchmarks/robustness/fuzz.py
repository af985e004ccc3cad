"""Hostile inputs for every reader: checkpoints, directories, reports, configurations, and what tasks return.

    python benchmarks/robustness/fuzz.py --inputs 100000 --seed 0 > benchmarks/results/fuzz.txt
    python benchmarks/robustness/fuzz.py --replay fuzz-faults/0-17-report.json

Sound files are changed at random, in their bytes and in their structure. An input is refused (an error of the
package's own), accepted, or a fault: another exception, more than five seconds of the processor, a gigabyte more of
memory, the end of the process, or code of the input that ran. Faults are kept, to be run again.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from readers import READERS, warm

from htcompress.errors import HTCompressError

SECONDS = 5.0
_PATIENCE = 60.0  # seconds on the clock, on a machine that does other things beside
MEMORY = 1 << 30
ADDRESSES = 4 << 30
_RESTART = 2000  # inputs a process reads: what leaks over many is not any one's fault


@dataclass
class Tally:
    """What came of the inputs of one reader."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of one input: `refused`, `accepted` or `fault`, with the words for it, seconds and bytes."""

    index: int
    reader: str
    kind: str
    words: str = ""
    seconds: float = 0.0
    memory: int = 0


def drawn(seed: int, index: int) -> tuple[str, bytes]:
    """The reader and the bytes of an input."""
    rng = random.Random(f"{seed}:{index}")
    name = rng.choices(list(READERS), [reader.share for reader in READERS.values()])[0]
    return name, READERS[name].make(rng)


def peak() -> int:
    """The largest resident size of this process since the last call, bytes."""
    with open("/proc/self/status") as file:
        found = next(line for line in file if line.startswith("VmHWM"))
    # Where the peak cannot be reset, it stays that of all inputs so far.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return int(found.split()[1]) * 1024


def read(name: str, data: bytes, folder: Path) -> tuple[str, str]:
    """Hand an input to its reader; what came of it, and the words."""
    marker = folder / "marker"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[name].read(data, folder)
        found = "accepted", ""
    except HTCompressError as error:
        found = ("refused", "") if 0 < len(str(error)) < 4000 else ("fault", f"a message of {len(str(error))} letters")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in where if "htcompress" in frame.filename] or where
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        found = "fault", f"{type(error).__name__} at {place}: {' '.join(str(error)[:160].split())}"
    return ("fault", "code of the input ran") if marker.exists() else found


def keep(outcome: Outcome, seed: int, folder: Path, faults: Path | None) -> None:
    """Keep the input that is at hand, by its number and its reader."""
    if faults is not None:
        faults.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "input", faults / f"{seed}-{outcome.index}-{outcome.reader.replace(' ', '_')}")


def work(seed: int, indexes: range, folder: Path, faults: Path | None, pipe: Connection) -> None:
    """Read inputs one after the other, and tell of each when it begins and when it ends."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["FUZZ_MARKER"] = str(folder / "marker")
    start: int | None = None
    for index in indexes:
        name, data = drawn(seed, index)
        (folder / "input").write_bytes(data)
        peak()
        start = peak() if start is None else start
        pipe.send((index, name))
        began = time.process_time()
        kind, words = read(name, data, folder)
        seconds, memory = time.process_time() - began, peak() - start
        if seconds > SECONDS:
            kind, words = "fault", f"{seconds:.1f} s"
        if memory > MEMORY:
            kind, words = "fault", f"{memory >> 20} MB more of memory"
        outcome = Outcome(index, name, kind, words, seconds, memory)
        if kind == "fault":  # here: whoever is told has the next input at hand already
            keep(outcome, seed, folder, faults)
            shutil.rmtree(folder / "marker", ignore_errors=True)
        pipe.send(outcome)
    pipe.send(None)


def outcomes(seed: int, inputs: range, folder: Path, faults: Path | None) -> Iterator[Outcome]:
    """What comes of every input, in processes of their own that are ended where an input takes too long."""
    context = multiprocessing.get_context("fork")
    at = inputs.start
    while at < inputs.stop:
        here, there = context.Pipe(duplex=False)
        batch = range(at, min(at + _RESTART, inputs.stop))
        process = context.Process(target=work, args=(seed, batch, folder, faults, there))
        process.start()
        there.close()
        running: tuple[int, str] | None = None
        try:
            while True:
                if not here.poll(_PATIENCE):
                    process.kill()
                    process.join()
                    if running is None:
                        raise RuntimeError(f"input {at} of seed {seed} takes too long to make")
                    index, name = running
                    ended = Outcome(index, name, "fault", f"more than {_PATIENCE:g} s", _PATIENCE)
                    keep(ended, seed, folder, faults)
                    yield ended
                    at = index + 1
                    break
                told = here.recv()
                if told is None:
                    at = batch.stop
                    break
                if isinstance(told, Outcome):
                    running, at = None, told.index + 1
                    yield told
                    if told.memory > MEMORY // 2:
                        process.kill()
                        break
                else:
                    running = told
        except EOFError:
            process.join()
            if running is None:
                raise RuntimeError(f"input {at} of seed {seed} could not be made") from None
            index, name = running
            ended = Outcome(index, name, "fault", f"the process ended with {process.exitcode}")
            keep(ended, seed, folder, faults)
            yield ended
            at = index + 1
        finally:
            process.join()
            here.close()


def fuzz(inputs: int, seed: int, faults: Path | None, *, first: int = 0) -> tuple[dict[str, Tally], list[Outcome]]:
    """Run so many inputs; what came of them by reader, and the faults, whose inputs are kept in a folder."""
    tallies = {name: Tally() for name in READERS}
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in outcomes(seed, range(first, first + inputs), Path(folder), faults):
            tally = tallies[outcome.reader]
            tally.outcomes[outcome.kind] += 1
            tally.slowest = max(tally.slowest, outcome.seconds)
            tally.largest = max(tally.largest, outcome.memory)
            if outcome.kind == "fault":
                found.append(outcome)
    return tallies, found


def table(tallies: dict[str, Tally]) -> str:
    """The tallies, a line for each reader."""
    lines = [f"{'reader':18}{'inputs':>9}{'refused':>9}{'accepted':>10}{'faults':>8}{'slowest s':>11}{'memory MB':>11}"]
    total = Tally()
    for tally in tallies.values():
        total.outcomes += tally.outcomes
        total.slowest, total.largest = max(total.slowest, tally.slowest), max(total.largest, tally.largest)
    for name, tally in {**tallies, "all": total}.items():
        counts = [tally.outcomes[kind] for kind in ("refused", "accepted", "fault")]
        lines.append(
            f"{name:18}{sum(counts):9,}{counts[0]:9,}{counts[1]:10,}{counts[2]:8,}{tally.slowest:11.2f}"
            f"{tally.largest / 1e6:11.0f}"
        )
    return "\n".join(lines)


def replay(path: Path) -> None:
    """Run a kept input again, in this process, with what it raises."""
    name = path.name.split("-", 2)[2].replace("_", " ")
    with tempfile.TemporaryDirectory() as folder:
        READERS[name].read(path.read_bytes(), Path(folder))
    print(f"{path} is accepted.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--faults", type=Path, default=Path("fuzz-faults"), help="the folder that faults are kept in")
    parser.add_argument("--replay", type=Path, help="an input that was kept, to be run again")
    given = parser.parse_args()
    if given.replay is not None:
        replay(given.replay)
        return 0
    warm()  # what is imported and made once is so here, for all processes
    began = time.monotonic()
    tallies, found = fuzz(given.inputs, given.seed, given.faults, first=given.first)
    print(f"python benchmarks/robustness/fuzz.py --inputs {given.inputs} --seed {given.seed}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {time.monotonic() - began:.0f} s\n")
    print(table(tallies))
    print(f"\nA fault: another exception than the package's own, more than {SECONDS:g} s, more than {MEMORY >> 20} MB.")
    for words, count in Counter(f"{fault.reader}: {fault.words}" for fault in found).most_common():
        print(f"{count:6}  {words}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

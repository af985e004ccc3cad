"""The accuracy cases on two revisions, side by side, with what differs beyond noise marked.

    python benchmarks/compare_revisions.py main my-branch
    python benchmarks/compare_revisions.py HEAD~1 HEAD --case moving_digits:5000 --seeds 0 1 2 --steps 100

Each revision is checked out into a folder of its own, and its own `benchmarks/accuracy.py` runs there on its own
library, in this environment, one revision after the other, on one thread. `.` stands for the tree as it is now. The
metric before and after fine-tuning is compared seed by seed; a difference of the means is marked where it is more
than twice the standard error of the seeds' differences. With one seed there is no such error: whatever differs is
marked with a question mark.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = ("moving_digits:5000", "moving_digits:2000", "japanese_vowels:10%")
_ROW = re.compile(r"^(?P<label>\S.*?\S)\s{2,}(?P<numbers>[\d,]+)\s+(?P<before>[\d.]+)\s+(?P<after>[\d.]+)\s+[\d.]+\s")
_HEAD = re.compile(r"^(?P<name>\S+): .* parameters, (?P<metric>\S+) (?P<dense>[\d.]+); at most (?P<budget>[\d,]*\d)")


@dataclass(frozen=True)
class Measured:
    """One row of `accuracy.py`: the numbers stored, the metric before fine-tuning and after."""

    numbers: int
    before: float
    after: float


Found = dict[tuple[str, str], Measured]
"""By case and row."""


def measured(tree: Path, cases: Sequence[str], rows: Sequence[str], seed: int, steps: int) -> Found:
    """Run the accuracy benchmark of a tree."""
    command = [sys.executable, "benchmarks/accuracy.py", "--seed", str(seed), "--steps", str(steps), "--rows", *rows]
    for case in cases:
        command += ["--case", case]
    paths = os.pathsep.join([str(tree), str(tree / "cli")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} in {tree} failed:\n{ran.stderr[-2000:]}")
    found: Found = {}
    case = ""
    for line in ran.stdout.splitlines():
        if head := _HEAD.match(line):
            case = f"{head['name']} at {head['budget']}"
            found[case, "dense"] = Measured(0, float(head["dense"]), float(head["dense"]))
        elif row := _ROW.match(line):
            numbers = int(row["numbers"].replace(",", ""))
            found[case, row["label"]] = Measured(numbers, float(row["before"]), float(row["after"]))
    if not found:
        raise RuntimeError(f"{tree} printed no row that could be read:\n{ran.stdout[-2000:]}")
    return found


def mark(differences: Sequence[float]) -> str:
    """`=` for equal, `~` within noise, `+` or `-` beyond it, `?` where one seed cannot tell."""
    mean = statistics.fmean(differences)
    if all(difference == 0 for difference in differences):
        return "="
    if len(differences) == 1:
        return "?"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return "~" if abs(mean) <= 2 * error else "+" if mean > 0 else "-"


def show(runs: Sequence[tuple[Found, Found]], names: Sequence[str]) -> int:
    """Print the table; how many rows differ beyond noise."""
    beyond = 0
    print(f"{'':52}{'numbers':>16}{'decomposed':>20}{'':3}{'fine-tuned':>20}")
    print(f"{'case':22}{'row':30}" + 3 * f"{names[0][:8]:>9}{names[1][:8]:>9}   ")
    for case, label in runs[0][0]:
        pairs = [(a[case, label], b[case, label]) for a, b in runs if (case, label) in b]
        if label == "dense" or not pairs:
            continue
        cells = [f"{pairs[0][0].numbers:>9,}{pairs[0][1].numbers:>9,}   "]
        for stage in ("before", "after"):
            before, after = ([getattr(pair[k], stage) for pair in pairs] for k in (0, 1))
            sign = mark([b - a for a, b in zip(before, after, strict=True)])
            beyond += sign in "+-?"
            cells.append(f"{statistics.fmean(before):9.4f}{statistics.fmean(after):9.4f} {sign} ")
        print(f"{case:22}{label:30}" + "".join(cells), flush=True)
    return beyond


def checked_out(revision: str, folder: Path) -> Path:
    """A revision in a folder of its own; the tree itself for `.`."""
    if revision == ".":
        return ROOT
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", "--quiet", folder, revision], check=True)
    cache = ROOT / "benchmarks" / ".cache"
    if cache.is_dir():
        (folder / "benchmarks" / ".cache").symlink_to(cache)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REVISION")
    parser.add_argument(
        "--case", action="append", metavar="MODEL:NUMBERS", help=f"default: {', '.join(CASES)}".replace("%", "%%")
    )
    parser.add_argument("--rows", nargs="+", default=["ht", "svd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    cases, runs = options.case or list(CASES), []
    # Named by what they are now: HEAD may be another by the end.
    shown = [revision if revision == "." else _short(revision) for revision in options.revisions]
    with tempfile.TemporaryDirectory(prefix="revisions-") as name:
        trees = []
        try:
            for index, revision in enumerate(options.revisions):
                trees.append(checked_out(revision, Path(name) / str(index)))
            for seed in options.seeds:
                both = [measured(tree, cases, options.rows, seed, options.steps) for tree in trees]
                runs.append((both[0], both[1]))
        finally:
            for tree in trees:
                if tree != ROOT:
                    subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    print(f"{shown[0]} and {shown[1]}; seeds {options.seeds}, {options.steps} steps of fine-tuning, 1 thread")
    beyond = show(runs, shown)
    print(f"{beyond} figures differ beyond noise (= equal, ~ within noise, + better, - worse, ? one seed cannot tell)")
    return 0


def _short(revision: str) -> str:
    ran = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", revision], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

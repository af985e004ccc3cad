"""What each stage of converting a model takes: processor seconds, seconds and peak memory.

    python benchmarks/speed/stages.py g2p:263kB arabic:986kB japanese_vowels:3000
    python benchmarks/speed/stages.py g2p:263kB --profile 40

A case is a model of `benchmarks/real/bytes.py`, or `stacked` of `stacked.py`, and a budget, in numbers or bytes;
nothing is fine-tuned. With `--profile` the functions that most time is spent in follow, by Python's own profiler, which
makes calls dearer than they are.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import pstats
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from htcompress.compression import converted
from htcompress.numbers import budget_of
from htcompress.observer import Observer
from htcompress.report import words
from htcompress.request import FineTuning, Goal, Request

HERE = Path(__file__).parent
BYTES, STACKED = HERE.parent / "real" / "bytes.py", HERE / "stacked.py"


class Stages(Observer):
    """Adds up what passes from the beginning of each stage to the next."""

    def __init__(self) -> None:
        self.spent: dict[str, tuple[float, float]] = {}
        self.current = "starting"
        self.began = time.process_time(), time.perf_counter()

    def stage(self, name: str, total: int | None = None) -> None:
        now = time.process_time(), time.perf_counter()
        before = self.spent.get(self.current, (0.0, 0.0))
        self.spent[self.current] = before[0] + now[0] - self.began[0], before[1] + now[1] - self.began[1]
        self.current, self.began = name, now


def models() -> Mapping[str, tuple[Path, Path]]:
    """Tasks and checkpoints by name."""
    spec = importlib.util.spec_from_file_location("real_bytes", BYTES)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{BYTES} is not there.")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stacked = STACKED, HERE.parent / ".cache" / "stacked" / "model.pt"
    return {**module.MODELS, "stacked": stacked}


def main() -> None:
    """Convert every case, and print what its stages took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="MODEL:BUDGET")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", action="store_true", help="print what each matrix became")
    parser.add_argument("--profile", type=int, metavar="ROWS")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), seed {options.seed}, no fine-tuning")
    known = models()
    for case in options.cases:
        name, _, budget = case.partition(":")
        task, checkpoint = known[name]
        numbers, stored = budget_of(budget, "budget")
        goal = Goal(budget=numbers, bytes=stored)
        request = Request(goal, "*", FineTuning(steps=0, seed=options.seed), options.seed, task=str(task))
        stages, profile = Stages(), cProfile.Profile() if options.profile else None
        if profile is not None:
            profile.enable()
        made = converted(checkpoint, request, observer=stages)
        if profile is not None:
            profile.disable()
        stages.stage("")
        report = made.report
        assert report.quality is not None
        print(
            f"\n{case}: {words.count(report.totals.parameters_after)} numbers, {words.size(report.totals.bytes_after)}"
        )
        print(f"  dense {report.quality.dense}, now {report.quality.finetuned or report.quality.decomposed}")
        if report.frontier:
            print(f"  expected to lose {report.frontier[-1][1]} of the outputs of all matrices")
        for layer in report.layers if options.forms else ():
            for m in layer.matrices:
                bits = "" if m.codec is None else m.codec
                print(f"  {layer.name} {m.name} {words.form(m)} rank {words.rank(m)}: {m.parameters} {bits} {m.error}")
        for stage, (processor, seconds) in stages.spent.items():
            print(f"  {stage:40}{processor:8.1f} s of the processor{seconds:8.1f} s")
        total = sum(processor for processor, _ in stages.spent.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"  {'in all':40}{total:8.1f} s of the processor, peak memory {peak:,.0f} MB", flush=True)
        if profile is not None:
            pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(options.profile)


if __name__ == "__main__":
    main()

"""Budgets of bytes on real models: HT with rounding beside rounding alone, truncated SVD and HT in 32 bits, one run.

    python benchmarks/real/fetched.py languages arabic; python benchmarks/real/g2p/fetch.py
    python benchmarks/real/bytes.py                                     # all cases; hours
    python benchmarks/real/bytes.py --case g2p:16 --case languages:32 --steps 1200 --seed 1

A case is a model and how many times smaller than its recurrent layers in 32 bits it has to be. Every row of a case is
fine-tuned alike. The letters model (g2p) was trained on the words that it is scored on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from htcompress.model.inventory import inventory
from htcompress.report import words
from htcompress.report.study import Study
from htcompress.request import FineTuning
from htcompress.sources.read import read_checkpoint
from htcompress.study import Place, compare

HERE = Path(__file__).parent
SAMPLES, CACHE = HERE.parents[1] / "sample_models", HERE.parent / ".cache"
MODELS = {
    "moving_digits": (SAMPLES / "moving_digits" / "task.py", SAMPLES / "moving_digits" / "model.pt"),
    "japanese_vowels": (SAMPLES / "japanese_vowels" / "task.py", SAMPLES / "japanese_vowels" / "model.pt"),
    **{name: (HERE / name / "task.py", CACHE / name / "model.pt") for name in ("g2p", "languages", "arabic")},
    **{
        name: (HERE.parent / "paper_scale" / f"{name}.py", CACHE / "paper_scale" / f"{name}.pt")
        for name in ("video", "gray")
    },
}
CASES = (
    *("moving_digits:938", "moving_digits:1500", "japanese_vowels:40"),
    *("g2p:8", "g2p:12", "g2p:16", "languages:16", "languages:32", "arabic:10", "arabic:16", "arabic:32"),
)


def run_case(case: str, formats: Sequence[str], seed: int, steps: int | None) -> Study:
    """Compare the formats on one case."""
    name, _, ratio = case.partition(":")
    task, checkpoint = MODELS[name]
    layers = inventory(read_checkpoint(checkpoint).tensors, source=str(checkpoint))
    stored = 4 * sum(layer.settings.dense_parameters for layer in layers)
    with tempfile.TemporaryDirectory() as folder:
        return compare(
            checkpoint,
            Path(folder) / "study",
            budget=f"{int(stored / float(ratio))}B",
            formats=formats,
            task=task,
            finetuning=None if steps == 0 else FineTuning(steps=steps, seed=seed),
            seed=seed,
            place=Place(jobs=1),
        )


def show(case: str, study: Study) -> None:
    """One line for each point."""
    dense = study.dense
    print(f"\n{case}: {words.size(dense.bytes)}, {study.metric} {words.metric(dense.metric)}", flush=True)
    for point in study.best_first():
        asked = "" if point.case.bits is None else f" {point.case.bits} bits"
        if point.parameters is None:
            print(f"  {point.case.format + asked:16} {words.size(point.least or 0)} at least", flush=True)
            continue
        after = "" if point.finetuned is None else f"{point.finetuned:10.4f}"
        before = float("nan") if point.decomposed is None else point.decomposed
        print(
            f"  {point.case.format + asked:16} {point.bytes or 0:10,} bytes {point.parameters:10,} numbers "
            f"{before:10.4f}{after} {point.seconds or 0:8.1f} s",
            flush=True,
        )


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="MODEL:TIMES", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--formats", nargs="+", default=["ht", "svd", "dense"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of fine-tuning; 0: none; default: as the data asks for")
    options = parser.parse_args()
    steps = "as many steps as the data asks for" if options.steps is None else f"{options.steps} steps"
    print(f"torch {torch.__version__}, seed {options.seed}, {steps} of fine-tuning, one process of one thread")
    for case in options.case or CASES:
        show(case, run_case(case, options.formats, options.seed, options.steps))


if __name__ == "__main__":
    main()

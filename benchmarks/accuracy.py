"""Accuracy at a number of parameters, or of bytes: HT beside truncated SVD and HT from random cores, in one run.

Every row of a case stores at most the same numbers and is fine-tuned alike, from the same dense model.

    python benchmarks/accuracy.py                                     # the samples
    python benchmarks/accuracy.py --case moving_digits:5000 --seed 1
    python benchmarks/accuracy.py --case moving_digits:4kB --rows ht svd
    python benchmarks/real/g2p/fetch.py; python benchmarks/accuracy.py --case g2p:25% --steps 1200
    python benchmarks/paper_scale/train.py video; python benchmarks/accuracy.py --case video:8808 --steps 800
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from htcompress.data import Data, Peeked
from htcompress.directory.read import config_of
from htcompress.errors import UnreachableError
from htcompress.model.inventory import inventory_of_model
from htcompress.model.proof import prove
from htcompress.model.replace import recurrent_modules
from htcompress.nn import HTRecurrent, Weight
from htcompress.numbers import budget_of
from htcompress.observer import Observer
from htcompress.opening import dense_model, places_of
from htcompress.planning import Plan
from htcompress.request import FineTuning, Goal
from htcompress.sources.read import read_checkpoint
from htcompress.stages import Orders, arranged, compact_model, observed, planned, training_batches, tried, tuned
from htcompress.task import Task, load_task
from htcompress.vocabulary import LayoutKind

HERE = Path(__file__).parent
SAMPLES, CACHE = HERE.parent / "sample_models", HERE / ".cache"
MODELS = {
    "moving_digits": (SAMPLES / "moving_digits" / "task.py", SAMPLES / "moving_digits" / "model.pt"),
    "japanese_vowels": (SAMPLES / "japanese_vowels" / "task.py", SAMPLES / "japanese_vowels" / "model.pt"),
    **{name: (HERE / "real" / name / "task.py", CACHE / name / "model.pt") for name in ("g2p", "languages", "arabic")},
    "video": (HERE / "paper_scale" / "video.py", CACHE / "paper_scale" / "video.pt"),
    "gray": (HERE / "paper_scale" / "gray.py", CACHE / "paper_scale" / "gray.pt"),
}
CASES = ("moving_digits:5000", "moving_digits:2000", "japanese_vowels:10%")


@dataclass(frozen=True)
class Row:
    """One way to compress: the layouts, with data or without, and what is done to the cores before training."""

    label: str
    layout: LayoutKind
    weighted: bool
    change: Callable[[nn.Module, int], nn.Module] = lambda model, seed: model


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """The same structure from random cores of the same norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Weight) and not module.is_dense:
                for core in module.parameters():
                    drawn = torch.randn(core.shape, generator=generator)
                    core.copy_(drawn * core.norm() / drawn.norm())
    return model


ROWS = {
    "ht": Row("HT, weighted", LayoutKind.AUTO, True),
    "ht-plain": Row("HT, plain", LayoutKind.AUTO, False),
    "svd": Row("truncated SVD, weighted", LayoutKind.SVD, True),
    "svd-plain": Row("truncated SVD, plain", LayoutKind.SVD, False),
    "random": Row("the first row's HT, random cores", LayoutKind.AUTO, True, randomised),
}


def run_case(name: str, size: str, rows: list[str], seed: int, steps: int) -> None:
    """Print the rows of one case."""
    place, checkpoint = MODELS[name]
    task = load_task(place)
    dense = dense_model(task, read_checkpoint(checkpoint), Observer())
    before = sum(layer.settings.dense_parameters for layer in inventory_of_model(dense))
    numbers, stored = budget_of(size, "--case") if not size.endswith("%") else (None, None)
    if size.endswith("%"):
        numbers = int(float(size.removesuffix("%")) / 100 * before)
    limit = numbers if stored is None else stored
    (metric, reference), *_ = task.evaluate(dense).items()
    asked = f"{limit:,}{'' if stored is None else ' bytes'}"
    print(f"\n{name}: {before:,} RNN parameters, {metric} {reference:.4f}; at most {asked}, seed {seed}, {steps} steps")
    print(f"{'':34} {'numbers':>8} {'decomposed':>10} {'fine-tuned':>10} {'of dense':>9} {'s':>6} {'s':>6}")
    began = time.perf_counter()
    data, observer = Data.of_task(task), Observer()
    calibration = Peeked(task.calibration)
    batch = tried(dense, data, calibration, None)
    if batch is None:
        raise RuntimeError("A case has calibration data.")
    proof = prove(dense, list(recurrent_modules(dense)), batch.arguments, batch.answer)
    statistics = observed(dense, proof, calibration, batch, seed, observer)
    print(f"{'':34} statistics {time.perf_counter() - began:.1f} s", flush=True)
    known: dict[tuple[LayoutKind, bool], tuple[nn.Module, Orders, Plan, float]] = {}
    for row in (ROWS[key] for key in rows):
        key = row.layout, row.weighted
        if key not in known:
            began = time.perf_counter()
            goal = Goal(budget=numbers, bytes=stored, layout=row.layout)
            ready = arranged(dense, proof, statistics if row.weighted else None, batch, goal, calibration)
            try:
                plan = planned(ready.layers, goal, ready.statistics, ready.orders, observer)
            except UnreachableError as error:
                print(f"{row.label:34} {error.least:>8} is the least that it stores", flush=True)
                continue
            known[key] = ready.model, ready.moved or {}, plan, time.perf_counter() - began
        source, moved, plan, spent = known[key]
        made, modules = compact_model(source, plan, proof.tied)
        places = places_of(config_of(modules, orders=moved))
        model = row.change(made, seed)
        layers = [m for m in model.modules() if isinstance(m, HTRecurrent)]
        kept = sum(m.parameter_count for m in layers)
        if (kept if stored is None else sum(gates.bytes for m in layers for gates in m.directions().values())) > limit:
            raise RuntimeError(f"{row.label} stores more than {limit}.")
        decomposed = headline(task, model)
        began = time.perf_counter()
        # A fresh task: every row trains on the same data.
        data = Data.of_task(load_task(place))
        training = Peeked(load_task(place).training)
        batches = training_batches(dense, data, training, batch)
        tuned(model, dense, batches, data, FineTuning(steps=steps, seed=seed), observer, places)
        seconds = time.perf_counter() - began
        after = headline(task, model)
        print(
            f"{row.label:34} {kept:8,} {decomposed:10.4f} {after:10.4f} {after / reference:9.3f} "
            f"{spent:6.1f} {seconds:6.1f}",
            flush=True,
        )


def headline(task: Task, model: nn.Module) -> float:
    """The task's first metric."""
    return next(iter(task.evaluate(model).values()))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", metavar="MODEL:SIZE", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s)")
    for case in options.case or CASES:
        name, size = case.split(":")
        run_case(name, size, options.rows, options.seed, options.steps)


if __name__ == "__main__":
    main()

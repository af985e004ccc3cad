"""Accuracy of the sample models at a number of parameters: HT beside truncated SVD and HT from random cores.

Every row of a case stores at most the same numbers and, where it is fine-tuned, is fine-tuned alike.

    python benchmarks/accuracy.py                                  # all cases
    python benchmarks/accuracy.py --case moving_digits:5000 --seed 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from htcompress.checkpoint.inventory import inventory_of_model
from htcompress.checkpoint.read import read_checkpoint
from htcompress.errors import UnreachableError
from htcompress.finetuning.distill import FineTuning, distill
from htcompress.matrix import LayoutKind
from htcompress.nn import HTRecurrent, HTWeight, replace_modules
from htcompress.observer import Observer
from htcompress.pipeline import dense_model
from htcompress.planning import Goal, plan_layers
from htcompress.statistics.collect import collect
from htcompress.task import Task, load_task

SAMPLES = Path(__file__).parent.parent / "sample_models"
CASES = ("moving_digits:5000", "moving_digits:2000", "japanese_vowels:10444")


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """The same structure from random cores of the same norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, HTWeight):
                for core in module.parameters():
                    drawn = torch.randn(core.shape, generator=generator)
                    core.copy_(drawn * core.norm() / drawn.norm())
    return model


def run_case(name: str, budget: int, seed: int, steps: int) -> None:
    """Print the rows of one case."""
    task = load_task(SAMPLES / name / "task.py")
    dense = dense_model(task, read_checkpoint(SAMPLES / name / "model.pt"), Observer())
    layers = inventory_of_model(dense)
    before = sum(layer.settings.dense_parameters for layer in layers)
    (metric, reference), *_ = task.evaluate(dense).items()
    print(f"\n{name}: {before:,} RNN parameters, {metric} {reference:.4f}; budget {budget:,}, seed {seed}")
    print(f"{'':34} {'numbers':>8} {'decomposed':>10} {'fine-tuned':>10} {'of dense':>9} {'s':>6} {'s':>6}")
    seen = collect(dense, task.calibration(), seed=seed)
    goals: list[tuple[str, LayoutKind, bool, Callable[[nn.Module], nn.Module]]] = [
        ("HT, weighted", LayoutKind.AUTO, True, lambda m: m),
        ("HT, plain", LayoutKind.AUTO, False, lambda m: m),
        ("truncated SVD, weighted", LayoutKind.SVD, True, lambda m: m),
        ("truncated SVD, plain", LayoutKind.SVD, False, lambda m: m),
        ("the first row's HT, random cores", LayoutKind.AUTO, True, lambda m: randomised(m, seed)),
    ]
    for label, layout, weighted, change in goals:
        began = time.perf_counter()
        try:
            plans = plan_layers(layers, Goal(budget=budget, layout=layout), seen if weighted else None)
        except UnreachableError as error:
            print(f"{label:34} {str(error).split(':')[0]}")
            continue
        model = change(replace_modules(dense, {plan.name: plan.build() for plan in plans}).eval())
        planned = time.perf_counter() - began
        numbers = sum(m.parameter_count for m in model.modules() if isinstance(m, HTRecurrent))
        assert numbers <= budget
        decomposed = headline(task, model)
        began = time.perf_counter()
        distill(model, dense, task.training, loss=task.loss, options=FineTuning(steps=steps, seed=seed))
        tuned = time.perf_counter() - began
        after = headline(task, model)
        print(
            f"{label:34} {numbers:8,} {decomposed:10.4f} {after:10.4f} {after / reference:9.3f} "
            f"{planned:6.1f} {tuned:6.1f}",
            flush=True,
        )


def headline(task: Task, model: nn.Module) -> float:
    """The task's first metric."""
    return next(iter(task.evaluate(model).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", metavar="SAMPLE:BUDGET", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=FineTuning().steps)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.steps} steps of fine-tuning")
    for case in options.case or CASES:
        name, budget = case.split(":")
        run_case(name, int(budget), options.seed, options.steps)


if __name__ == "__main__":
    main()

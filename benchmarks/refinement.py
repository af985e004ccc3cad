"""How far L-BFGS comes in as many steps: in the numbers that are stored, and in the coordinates of the library.

    python benchmarks/refinement.py moving_digits:5000 japanese_vowels:3000 > benchmarks/results/refinement.txt
    python benchmarks/refinement.py japanese_vowels:5000 --format tt

A case is a sample or a model of `real/bytes.py`, and a budget in numbers. While it is converted, what is refined is
refined by both from where it began; printed are the squared errors in the metric, as parts of that of zero, after
so many evaluations of the error, and what the evaluations took. Every EVERY-th start is shown, and the geometric mean
of the two ways' quotients over all of those. One thread.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "speed"))
import stages

from htcompress.compression import converted
from htcompress.forms import ht_search, network_search, refine
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.observer import Observer
from htcompress.request import FineTuning, Goal, Request
from htcompress.vocabulary import Format

AT = (1, 6, 12, 24, 48, 72)
"""Evaluations after which errors are printed."""

ITERATIONS = 60


class AsStored:
    """In the place of `Coordinates`: the cores as they are, of equal norms."""

    def __init__(self, start: Any, dtype: torch.dtype = torch.float64) -> None:
        self.start = start
        cores = [core.to(dtype) for core in start.cores if isinstance(core, Tensor)]
        norms = [float(torch.linalg.vector_norm(core)) or 1.0 for core in cores]
        mean = math.prod(norm ** (1 / len(norms)) for norm in norms)
        self.values = tuple(core * (mean / norm) for core, norm in zip(cores, norms, strict=True))

    @classmethod
    def of(cls, start: Any, metric: Any) -> AsStored:
        return cls(start)

    def to(self, dtype: torch.dtype) -> AsStored:
        return AsStored(self.start, dtype)

    def matrix(self, values: Sequence[Tensor]) -> Any:
        given = iter(values)
        return self.start.with_cores([next(given) if isinstance(core, Tensor) else core for core in self.start.cores])


def descent(coordinates: Any, start: Any, target: WeightedMatrix, split: Any) -> tuple[list[float], float]:
    """The errors of one evaluation after the other, and the seconds that one took."""
    errors: list[float] = []
    objectives = [refine._OfFactors, refine._OfMatrix]
    asked = [objective.at for objective in objectives]

    def noting(at: Any) -> Any:
        def noted(self: Any, matrix: StoredMatrix) -> Tensor:
            error: Tensor = at(self, matrix)
            errors.append(float(error.detach()))
            return error

        return noted

    known = refine.Coordinates
    refine.Coordinates = coordinates  # type: ignore[misc]
    for objective, at in zip(objectives, asked, strict=True):
        objective.at = noting(at)  # type: ignore[method-assign]
    began = time.perf_counter()
    try:
        refine.refine_cores(start, target, split, iterations=ITERATIONS)
    finally:
        refine.Coordinates = known  # type: ignore[misc]
        for objective, at in zip(objectives, asked, strict=True):
            objective.at = at  # type: ignore[method-assign]
    return errors, (time.perf_counter() - began) / max(1, len(errors))


def shown(errors: Sequence[float]) -> list[float]:
    return [min(errors[:most]) for most in AT]


def study(case: str, every: int, form: Format) -> None:
    """Convert one case, and print what refining its starts comes to."""
    name, _, budget = case.partition(":")
    task, checkpoint = stages.models()[name]
    seen, quotients = 0, []
    print(f"\n{case}, {form.value}\n{'':48}{''.join(f'{most:>9}' for most in AT)}   ms each")

    original = refine.refine_cores

    def both(start: Any, target: WeightedMatrix, split: Any = None, *, iterations: int = refine.ITERATIONS) -> Any:
        nonlocal seen
        seen += 1
        if seen % every == 0:
            described = start.description()
            rows, cols = ([mode for mode in modes if mode > 1] for modes in (described.row_modes, described.col_modes))
            found = []
            for label, coordinates in (("as stored", AsStored), ("coordinates", refine.Coordinates)):
                errors, seconds = descent(coordinates, start, target, split)
                found.append(shown(errors))
                title = f"{rows} x {cols} of {start.parameters}" if label == "as stored" else ""
                numbers = "".join(f"{error:9.5f}" for error in found[-1])
                print(f"{title[:34]:36}{label:12}{numbers}{1000 * seconds:10.1f}", flush=True)
            quotients.append([math.log(b / a) for a, b in zip(*found, strict=True)])
        return original(start, target, split, iterations=iterations)

    ht_search.refine_cores = both  # type: ignore[attr-defined]
    network_search.refine_cores = both  # type: ignore[attr-defined]
    goal = Goal(budget=int(budget), format=form)
    request = Request(goal, "*", FineTuning(steps=0), 0, task=str(task))
    converted(checkpoint, request, observer=Observer())
    ht_search.refine_cores = network_search.refine_cores = original  # type: ignore[attr-defined]
    if quotients:
        means = [math.exp(sum(column) / len(column)) for column in zip(*quotients, strict=True)]
        print(f"{f'{len(quotients)} starts: coordinates / as stored':48}{''.join(f'{mean:9.3f}' for mean in means)}")


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="MODEL:NUMBERS")
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--format", type=Format, default=Format.HT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {ITERATIONS} iterations")
    for case in options.cases:
        study(case, options.every, options.format)


if __name__ == "__main__":
    main()

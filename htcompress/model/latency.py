"""How long one call of each model takes, in turns, so that a busy moment meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import nn

from htcompress.model.plain import without_packing
from htcompress.values import call

LATENCY_OF = "a batch of the task's, 1 thread on a CPU"
"""What `latencies` is called on, in words."""

_ROUNDS, _LEAST_ROUNDS, _PATIENCE_S = 9, 3, 1.5
"""Calls of each model in turn whose median counts; fewer where they take longer than so many seconds."""


def latencies(models: Mapping[str, nn.Module], arguments: Sequence[Any]) -> dict[str, float]:
    """Milliseconds of `model(*arguments)`, as `interleaved` measures them, without gradients."""

    def called(model: nn.Module) -> Callable[[], object]:
        return lambda: call(model, arguments)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models.values():
            stack.enter_context(without_packing(model))
        return interleaved({name: called(model) for name, model in models.items()})


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each call, the median of rounds in which they take turns; torch has one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seen: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    try:
        for turn in range(_ROUNDS + 1):
            if turn > _LEAST_ROUNDS and time.perf_counter() - began > _PATIENCE_S:
                break
            for name, made in calls.items():
                start = time.perf_counter()
                made()
                if turn:  # the first call warms up
                    seen[name].append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    return {name: round(median(values), 3) for name, values in seen.items()}

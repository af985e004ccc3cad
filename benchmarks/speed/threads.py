"""Training steps of LSTMs on two threads against one: from which size on a second thread pays.

    python benchmarks/speed/threads.py
    OMP_WAIT_POLICY=passive python benchmarks/speed/threads.py

Run it where nothing else runs. Threads spin while they wait, or sleep (`passive`).
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from torch import nn

SIZES = (
    *((1, 128, 250, {}), (4, 128, 100, {}), (16, 64, 100, {"num_layers": 2}), (1, 256, 100, {}), (16, 128, 100, {})),
    (32, 256, 50, {"bidirectional": True}),
)
SECONDS = 1.2


def step_time(batch: int, units: int, steps: int, options: dict[str, int], threads: int) -> float:
    """Seconds of a training step."""
    torch.set_num_threads(threads)
    model, x = nn.LSTM(units, units, **options), torch.randn(steps, batch, units)
    optimizer = torch.optim.Adam(model.parameters())
    taken, began = -1, 0.0
    while taken < 1 or time.perf_counter() - began < SECONDS:
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
        taken += 1
        began = began or time.perf_counter()  # the first step warms up
    return (time.perf_counter() - began) / taken


def main() -> None:
    """Print a line for each size. Each number of threads has a process: idle threads of another would spin in it."""
    if len(sys.argv) > 1:
        print(*(step_time(*size, int(sys.argv[1])) for size in SIZES))
        return
    runs = [subprocess.run([sys.executable, __file__, n], capture_output=True, text=True, check=True) for n in "12"]
    one, two = ([float(word) for word in run.stdout.split()] for run in runs)
    for (batch, units, steps, options), alone, shared in zip(SIZES, one, two, strict=True):
        print(f"batch {batch}, {units} units, {steps} steps, {options or 'one layer'}: {shared / alone:.2f}")


if __name__ == "__main__":
    main()

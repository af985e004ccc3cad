"""A step of fine-tuning beside a training step of the dense model, threads stated.

    python benchmarks/speed/finetune.py --rounds 3

An LSTM 40 to 256 of three layers (1.4 million numbers), 32 sequences of 160 steps, a linear head; the task's loss is
the squared error. What a step of fine-tuning takes is the difference between a long run of `distill` and a short one,
so that looks at held-out data and the beginning are not in it. Rounds take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from statistics import median

import torch
from torch import Tensor, nn

import htcompress
from htcompress.finetuning.distill import distill
from htcompress.request import FineTuning

SHORT, LONG = 1, 6


class Model(nn.Module):
    """Three layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(40, 256, 3, batch_first=True)
        self.head = nn.Linear(256, 40)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, steps, 40) to the same."""
        return self.head(self.rnn(x)[0])


def data() -> Iterator[tuple[tuple[Tensor], Tensor]]:
    """A pass of 64 times the same batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(32, 160, 40, generator=generator) for _ in range(2))
    yield from repeat(((x,), y), 64)


def dense_step(model: nn.Module) -> Callable[[], None]:
    """A training step as one would write it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    (x,), y = next(data())

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def tuned(student: nn.Module, teacher: nn.Module | None, steps: int) -> Callable[[], object]:
    """A run of so many steps."""
    options = FineTuning(steps=steps, check_every=1000, held_out=1)
    return lambda: distill(student, teacher, data, loss=nn.functional.mse_loss, options=options)


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = Model().eval()
    print(f"torch {torch.__version__}, {options.threads} thread(s), LSTM 40 to 256 x 3, 32 x 160 steps", flush=True)
    rows: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
        "dense training step": (dense_step(Model()), None)
    }
    for ratio in (4, 10):
        compact = htcompress.compress(dense, ratio=ratio).model
        assert compact is not None
        rows[f"1/{ratio}, the task's loss alone"] = tuned(compact, None, LONG), tuned(compact, None, SHORT)
        rows[f"1/{ratio}, with the teacher"] = tuned(compact, dense, LONG), tuned(compact, dense, SHORT)
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for name, (long, short) in rows.items():
            if short is not None:
                taken[name].append((seconds(long) - seconds(short)) / (LONG - SHORT))
            else:
                taken[name].append(seconds(long))
    reference = median(taken["dense training step"])
    for name, values in taken.items():
        print(f"{name:40}{1000 * median(values):8.0f} ms{median(values) / reference:8.2f} of dense", flush=True)


if __name__ == "__main__":
    main()

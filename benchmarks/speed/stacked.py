"""A made-up model of 1.4 million numbers for timings: LSTM 40 to 256 in three layers, 413 sequences of 160 steps.

    python benchmarks/speed/stacked.py       # trains it, some minutes, into benchmarks/.cache
    python benchmarks/speed/stages.py stacked:350000 --threads 2

As a task it asks which of 29 random directions the sum of all steps up to now points along most.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHECKPOINT = Path(__file__).parents[1] / ".cache" / "stacked" / "model.pt"
INPUTS, UNITS, LAYERS, CLASSES = 40, 256, 3, 29
SEQUENCES, STEPS, BATCH, EPOCHS = 413, 160, 16, 16


class Stacked(nn.Module):
    """Logits (batch, steps, 29) of sequences (batch, steps, 40)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, UNITS, LAYERS, batch_first=True)
        self.out = nn.Linear(UNITS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits for every step."""
        logits: Tensor = self.out(self.lstm(x)[0])
        return logits


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers of a seed of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences of correlated steps, whose inputs are of sizes from 1 to a hundredth, and their classes."""
    x = drawn(seed, count, STEPS, INPUTS)
    for t in range(1, STEPS):
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * x[:, t]
    x = x @ (drawn(5, INPUTS, INPUTS) * torch.logspace(0, -2, INPUTS)[:, None])
    y = (x @ drawn(6, INPUTS, CLASSES)).cumsum(1).argmax(-1)
    yield from zip(x.split(BATCH), y.split(BATCH), strict=True)


def model() -> nn.Module:
    """Untrained."""
    torch.manual_seed(0)
    return Stacked()


def calibration() -> Iterator[tuple[Tensor]]:
    """All sequences that it was trained on."""
    for x, _ in training():
        yield (x,)


def training() -> Iterator[tuple[Tensor, Tensor]]:
    """413 sequences."""
    return batches(1, SEQUENCES)


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of every step."""
    return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def evaluate(model: nn.Module) -> float:
    """The part of the steps of 64 other sequences whose class is right."""
    right = [(model(x).argmax(-1) == y).double().mean() for x, y in batches(2, 64)]
    return float(torch.stack(right).mean())


def main() -> None:
    """Train it with Adam, 16 passes."""
    made, began = model(), time.perf_counter()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for epoch in range(EPOCHS):
        for batch in training():
            optimizer.zero_grad()
            loss(made(batch[0]), batch).backward()
            torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            print(f"pass {epoch}: {evaluate(made):.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made.state_dict(), CHECKPOINT)


if __name__ == "__main__":
    main()

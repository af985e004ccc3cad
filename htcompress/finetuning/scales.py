"""The units of the loss: how far what the teacher gives is spread, over several batches as if they were one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from htcompress.finetuning.taught import Answer
from htcompress.values import answered, tensors_of


@dataclass(frozen=True)
class Scale:
    """What a mean squared difference counts: times `weight`, by `variance` (of what was wanted)."""

    weight: float
    variance: float


Scales = Mapping[str, Scale]
"""Those of a batch: by `OUTPUT` and the place of a tensor among the outputs, or `STATES` and the name of a layer."""

OUTPUT, STATES = "output.", "states."


@dataclass(frozen=True)
class Spread:
    """How many answers some tensors hold (`answered`), their mean, and the sum of their squared distances from it."""

    count: int
    mean: float
    squares: float

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Spread:
        """That of the numbers of some tensors."""
        flat = torch.cat([t.detach().flatten().double() for t in tensors]) if tensors else torch.zeros(0)
        flat = flat[answered(flat)]
        if flat.numel() == 0:
            return cls(0, 0.0, 0.0)
        mean = float(flat.mean())
        return cls(flat.numel(), mean, float((flat - mean).square().sum()))

    def joined(self, other: Spread) -> Spread:
        """That of both together (Chan et al. 1979, Updating formulae for computing sample variances)."""
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Spread(count, mean, self.squares + other.squares + apart**2 * self.count * other.count / count)


def spreads(answer: Answer) -> dict[str, Spread]:
    """How far the tensors of an answer are spread, by the names that `Scales` have."""
    outputs = {f"{OUTPUT}{i}": Spread.of([t]) for i, t in enumerate(tensors_of(answer.output))}
    return outputs | {f"{STATES}{name}": Spread.of(found) for name, found in answer.states.items() if found}


def scales_of(group: Sequence[Mapping[str, Spread]]) -> list[Scales]:
    """The scales of each batch of a group, with which the mean of their losses is the loss of all in one batch.

    A batch counts by the numbers that it has, and all of them by the variance of all.
    """
    whole: dict[str, Spread] = {}
    for batch in group:
        for name, spread in batch.items():
            whole[name] = whole[name].joined(spread) if name in whole else spread
    return [
        {
            name: Scale(
                spread.count * len(group) / max(whole[name].count, 1), whole[name].squares / max(whole[name].count, 1)
            )
            for name, spread in batch.items()
        }
        for batch in group
    ]


def in_order(parts: Sequence[Sequence[Any]], group: int) -> list[list[Any]]:
    """What processes give of their own batches (see `Share.own`), in the order of the batches, group by group."""
    processes = len(parts)
    total = sum(len(part) for part in parts)
    left = [iter(part) for part in parts]
    items = [next(left[i % group % processes]) for i in range(total)]
    return [items[begin : begin + group] for begin in range(0, total, group)]

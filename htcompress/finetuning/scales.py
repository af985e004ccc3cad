"""The units of the loss: how far what the teacher gives is spread, over several batches as if they were one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from htcompress.finetuning.taught import Answer
from htcompress.spread import Spread
from htcompress.values import answers_in


@dataclass(frozen=True)
class Scale:
    """What a mean squared difference counts: times `weight`, by `variance` (of what was wanted)."""

    weight: float
    variance: float


Scales = Mapping[str, Scale]
"""Those of a batch: by `OUTPUT` and the place of a tensor among the outputs, or `STATES` and the name of a layer."""

OUTPUT, STATES = "output.", "states."


def spreads(answer: Answer) -> dict[str, Spread]:
    """How far the tensors of an answer are spread, by the names that `Scales` have."""
    outputs = {f"{OUTPUT}{i}": Spread.of([t]) for i, t in enumerate(answers_in(answer.output))}
    return outputs | {f"{STATES}{name}": Spread.of(found) for name, found in answer.states.items() if found}


def scales_of(group: Sequence[Mapping[str, Spread]]) -> list[Scales]:
    """The scales of each batch of a group, with which the mean of their losses is the loss of all in one batch.

    A batch counts by the numbers that it has, and all of them by the variance of all.
    """
    whole = _together(group)
    return [
        {
            name: Scale(spread.count * len(group) / max(whole[name].count, 1), whole[name].variance)
            for name, spread in batch.items()
        }
        for batch in group
    ]


def usual(batches: Sequence[Mapping[str, Spread]]) -> dict[str, float]:
    """The variance of each tensor of an answer over many batches."""
    return {name: spread.variance for name, spread in _together(batches).items()}


def _together(batches: Sequence[Mapping[str, Spread]]) -> dict[str, Spread]:
    whole: dict[str, Spread] = {}
    for batch in batches:
        for name, spread in batch.items():
            whole[name] = whole[name].joined(spread) if name in whole else spread
    return whole


def in_order(parts: Sequence[Sequence[Any]], group: int) -> list[list[Any]]:
    """What processes give of their own batches (see `Share.own`), in the order of the batches, group by group."""
    processes = len(parts)
    total = sum(len(part) for part in parts)
    left = [iter(part) for part in parts]
    items = [next(left[i % group % processes]) for i in range(total)]
    return [items[begin : begin + group] for begin in range(0, total, group)]

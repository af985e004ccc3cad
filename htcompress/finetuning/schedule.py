"""How long the steps are: relative to what they change, and along a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

_WARM = 0.05
"""The part of the schedule that warms up: as long as Adam's second moments take to settle."""

_LEAST_SIZE = 1e-2
"""The least root mean square by which a parameter's steps are scaled: one that is zero has to move, too."""


def optimizer_of(parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW whose steps are relative to the size of the numbers in each tensor.

    Cores differ in size by orders of magnitude: one step for all would stand still in some and wreck others.
    """
    groups = []
    for parameter in parameters:
        size = float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
        groups.append({"params": [parameter], "lr": learning_rate * max(size, _LEAST_SIZE)})
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


def schedule(done: float) -> float:
    """The learning rate as a part of its peak, by the part of the way that is done: a short rise, then a cosine."""
    if done < _WARM:
        return (done + 0.1 * _WARM) / (1.1 * _WARM)
    return 0.5 * (1 + math.cos(math.pi * (min(done, 1.0) - _WARM) / (1 - _WARM))) + 1e-3

"""What the tests of faults share; each is the smallest case of its kind that use has shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from small import Outcome
from torch import Tensor, nn

import htcompress

BEYOND = 10**7
"""A budget beyond all need: the result equals the model."""

Command = Callable[..., Outcome]


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def compact(model: nn.Module, **options: Any) -> nn.Module:
    made = htcompress.compress(model, **{"budget": BEYOND, **options}).model
    assert made is not None
    return made


class Around(nn.Module):
    """A model around one recurrent module, with a head."""

    def __init__(self, rnn: nn.Module, size: int = 8) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Words(nn.Module):
    def __init__(self, sparse: bool = False, size: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, size, sparse=sparse)
        self.rnn = nn.LSTM(size, size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.embed(x))[0]

"""Small models, checkpoints and tasks for the tests of the outer layers, and a way to run commands in process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from htcompress.observer import Observer

INPUTS, HIDDEN, CLASSES = 24, 8, 3

TASK = """\
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(24, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def batches(seed, count):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(8, 5, 24, generator=generator), torch.randint(3, (8,), generator=generator)


def model():
    return Tagger()


def calibration():
    for x, _ in batches(1, 4):
        yield x


def training():
    return batches(2, 8)


def loss(output, target):
    return nn.functional.cross_entropy(output, target)


def evaluate(model):
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float().mean() for x, y in batches(3, 4)]
    return {"accuracy": float(torch.stack(right).mean()), "classes": 3}
"""
"""A whole task for `Tagger`; tests append to it what they change."""


class Tagger(nn.Module):
    """The model of `TASK`."""

    def __init__(self, inputs: int = INPUTS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Twice(nn.Module):
    """A model that holds one recurrent layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


def tagger(seed: int = 0) -> Tagger:
    """A `Tagger` that stands for a trained one."""
    torch.manual_seed(seed)
    return Tagger().eval()


def clips(seed: int = 5, batch: int = 4) -> Tensor:
    """Inputs of a `Tagger`."""
    return torch.randn(batch, 5, INPUTS, generator=torch.Generator().manual_seed(seed))


def save_tagger(path: Path, seed: int = 0, **changed: Tensor | None) -> Path:
    """Save the state_dict of a `Tagger`; `changed` replaces tensors (`rnn__weight_ih_l0`), None takes them out."""
    state: dict[str, Tensor] = dict(tagger(seed).state_dict())
    for key, tensor in changed.items():
        name = key.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    torch.save(state, path)
    return path


def write_task(path: Path, *added: str) -> Path:
    """Write `TASK`, and after it what overrides or removes parts of it."""
    path.write_text("\n\n".join([TASK, *added]) + "\n", encoding="utf-8")
    return path


def listing(directory: Path) -> dict[str, bytes]:
    """Every file and folder under a directory with its bytes: equal before and after where nothing was left."""
    found = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): b"" if path.is_dir() else path.read_bytes() for path in found}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state_dicts have the same names, dtypes and numbers."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


class Listener(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.messages: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)

    def message(self, text: str) -> None:
        self.messages.append(text)


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

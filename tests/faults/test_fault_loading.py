"""Faults of kinds 17 and 21: weights that load into the user's model and not into ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_models import BEYOND, near
from small import clips, write_task
from torch import Tensor, nn

import htcompress
from htcompress.request import Goal

NORMED = """
class Normed(Tagger):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.norm(super().forward(x)) * self.scale

    def _load_from_state_dict(self, state, prefix, *rest):
        if prefix + "gain" in state:
            state[prefix + "scale"] = state.pop(prefix + "gain")
        super()._load_from_state_dict(state, prefix, *rest)

    def get_extra_state(self):
        return {"version": 3, "names": ("a", "b")}

    def set_extra_state(self, state):
        self.seen = state

def model():
    return Normed()
"""


@pytest.mark.parametrize("with_task", [True, False])
def test_17_load_state_dict_is_the_judge(tmp_path: Path, with_task: bool) -> None:
    write_task(tmp_path / "task.py", NORMED)
    scope: dict[str, Any] = {}
    exec((tmp_path / "task.py").read_text(), scope)
    model = scope["Normed"]().eval()
    with torch.no_grad():
        model.scale.mul_(torch.tensor([1.0, 2.0, 3.0]))
    state = dict(model.state_dict())
    del state["norm.num_batches_tracked"]
    state["gain"] = state.pop("scale")
    state["_extra_state"] = {"version": 3, "names": ("a", "b")}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "model.pt")
    task = tmp_path / "task.py" if with_task else None
    made = htcompress.convert(tmp_path / "model.pt", goal=Goal(budget=BEYOND), task=task, finetuning=None)
    htcompress.save(made, tmp_path / "out")
    again = htcompress.load(tmp_path / "out", scope["Normed"]().eval())
    assert near(again(clips()), model(clips()))
    assert again.seen == {"version": 3, "names": ("a", "b")}


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("rnn.", "module.rnn."),
        pytest.param("module.rnn.", "rnn.", marks=pytest.mark.full),
        ("net._orig_mod.rnn.", "net.rnn."),
        pytest.param("model.rnn.", "rnn.", marks=pytest.mark.full),
    ],
)
def test_17_prefixes_on_either_side(tmp_path: Path, stored: str, own: str) -> None:
    wrapped = "rnn"
    lines = ["class Box(nn.Module):", "    def __init__(self, inner, name):", "        super().__init__()"]
    lines += ["        setattr(self, name, inner)", "        self.name = name"]
    lines += ["    def forward(self, x):", "        return getattr(self, self.name)(x)", "", "def model():"]
    lines += ["    made = nn.LSTM(24, 8, batch_first=True)"]
    for name in reversed(own.removesuffix(".").split(".")):
        lines.append(f"    made = Box(made, {name!r})")
    lines.append("    return made")
    task = write_task(tmp_path / "task.py", "\n".join(lines), "del evaluate, training, loss")
    lstm = nn.LSTM(24, 8, batch_first=True)
    torch.save({stored + name: value for name, value in lstm.state_dict().items()}, tmp_path / "model.pt")
    made = htcompress.convert(tmp_path / "model.pt", goal=Goal(budget=BEYOND), task=task, finetuning=None)
    assert made.model is not None
    assert near(made.model(clips())[0], lstm(clips())[0])
    plain = htcompress.convert(tmp_path / "model.pt", goal=Goal(budget=BEYOND))
    htcompress.save(plain, tmp_path / "out")
    scope: dict[str, Any] = {}
    exec(task.read_text(), scope)
    assert near(htcompress.load(tmp_path / "out", scope["model"]())(clips())[0], lstm(clips())[0])
    assert wrapped in stored


class Fronted(nn.Module):
    """A tagger behind a front of another kind of module."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front = front
        self.rnn = nn.LSTM(24, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.front(x))[0]


def _scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(24, 24), nn.Tanh()))


def _quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(24, 24)), {nn.Linear})


@pytest.mark.parametrize("front", [_scripted, _quantised])
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_21_modules_that_copy_and_load_in_ways_of_their_own(front: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Fronted(front()).eval()
    result = htcompress.compress(model, budget=500, calibration=[clips()])
    assert all(p.requires_grad for p in (*model.front.parameters(), *result.model.front.parameters()))
    assert near(result.model.front(clips()), model.front(clips()))
    if front is _scripted:  # safetensors hold no quantised numbers
        htcompress.save(result, tmp_path / "out")
        assert near(htcompress.load(tmp_path / "out", Fronted(front()).eval())(clips()), result.model(clips()))

"""Faults of kind 2: a stand-in that is not the user's module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crossing import some
from fault_models import BEYOND, Around, near
from small import Listener, clips
from torch import Tensor, nn

import htcompress
from htcompress.errors import CheckpointError


class Plus(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        out, state = super().forward(x, hx)
        return out + 1, state


class Lengths(nn.GRU):
    """Takes lengths, and masks what is behind them."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        out, state = super().forward(x)
        if lengths is None:
            return out, state
        return out * (torch.arange(x.shape[1])[None, :, None] < lengths[:, None, None]), state


class LayerNormCell(nn.LSTMCell):
    def __init__(self, inputs: int, size: int) -> None:
        super().__init__(inputs, size)
        self.norm = nn.LayerNorm(4 * size)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        h, c = hx if hx is not None else (x.new_zeros(len(x), self.hidden_size),) * 2
        gates = nn.functional.linear(x, self.weight_ih, self.bias_ih)
        gates = self.norm(gates + nn.functional.linear(h, self.weight_hh, self.bias_hh))
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Stepped(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.first = nn.GRU(24, 24, batch_first=True)
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.first(x)[0].unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return state[0]


def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output[0] * 2, output[1]


def hooked() -> nn.Module:
    model = Around(nn.LSTM(24, 8, batch_first=True))
    model.rnn.register_forward_hook(doubled)
    model.rnn.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1, *inputs[1:]))
    return model


class Asking(Around):
    """Asks for the type, the mode and the weights."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.rnn, nn.LSTM)
        assert self.rnn.mode == "LSTM"
        assert (self.rnn.input_size, self.rnn.hidden_size, self.rnn.num_layers) == (24, 8, 1)
        assert [tuple(w.shape) for w in self.rnn.all_weights[0]] == [(32, 24), (32, 8), (32,), (32,)]
        self.rnn.flatten_parameters()
        return super().forward(x) + self.rnn.weight_hh_l0.sum()


class Helping(nn.LSTM):
    def strength(self) -> Tensor:
        return self.weight_ih_l0.norm() + self.gain

    gain = 2.0


class Helped(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.rnn.strength()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Around(Plus(24, 8, batch_first=True)),
        lambda: Around(Lengths(24, 8, batch_first=True)),
        hooked,
        lambda: Asking(nn.LSTM(24, 8, batch_first=True)),
        lambda: Helped(Helping(24, 8, batch_first=True)),
        lambda: Stepped(LayerNormCell(24, 8)),
    ],
    ids=["forward", "lengths", "hooks", "questions", "helper", "cell"],
)
@pytest.mark.parametrize("budget", some([BEYOND, 700], BEYOND))
def test_2_whatever_is_added_to_a_layer_stays(make: Callable[[], nn.Module], budget: int, tmp_path: Path) -> None:
    model = make().eval()
    result = htcompress.compress(model, budget=budget, calibration=[clips()])
    assert result.model is not None
    if budget == BEYOND:
        assert near(result.model(clips()), model(clips()))
    htcompress.save(result, tmp_path / "out")
    assert torch.equal(htcompress.load(tmp_path / "out", make().eval())(clips()), result.model(clips()))
    assert torch.equal(copy.deepcopy(result.model)(clips()), result.model(clips()))


def test_2_a_cell_with_equations_of_its_own_is_named_and_left() -> None:
    listener = Listener()
    result = htcompress.compress(Stepped(LayerNormCell(24, 8)), budget=2000, calibration=[clips()], observer=listener)
    assert list(result.modules) == ["first"]
    assert "does not go through torch's" in result.report.left["cell"]
    assert any("cell stays dense" in message for message in listener.messages)
    with pytest.raises(CheckpointError, match="None of the recurrent layers can be compressed"):
        htcompress.compress(Stepped(LayerNormCell(24, 8)), budget=2000, layers="cell", calibration=[clips()])


class Typed(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if type(self.rnn) is nn.LSTM else 2)


def patched() -> nn.Module:
    model = Around(nn.LSTM(24, 8, batch_first=True))
    original = model.rnn.forward
    model.rnn.forward = lambda x: (original(x)[0] + 1, None)
    return model


class Closed(Around):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__(rnn)
        self.run = lambda x: rnn(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Typed(nn.LSTM(24, 8, batch_first=True)), "outputs differ by"),
        (patched, "replaced on the instance"),
        (lambda: Closed(nn.LSTM(24, 8, batch_first=True)), "outside of the model's modules"),
    ],
    ids=["type", "patch", "closure"],
)
def test_2_what_no_stand_in_can_do_is_named(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        htcompress.compress(make(), budget=700, calibration=[clips()])


@pytest.mark.parametrize("make", [hooked, lambda: Around(Plus(24, 8, batch_first=True))])
def test_2_without_data_nothing_is_taken_on_trust(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(CheckpointError, match="without data nothing shows what it does"):
        htcompress.compress(make(), budget=700)


class Autocast(nn.Module):
    """A model that computes in half precision by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(24, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.rnn(x)[0]).float()


def test_a_model_that_casts_by_itself_is_compressed() -> None:
    torch.manual_seed(0)
    model = Autocast().eval()
    result = htcompress.compress(model, budget=700, calibration=[clips()])
    assert list(result.modules) == ["rnn"]
    assert near(htcompress.compress(model, ratio=1.0, calibration=[clips()]).model(clips()), model(clips()), 0.02)

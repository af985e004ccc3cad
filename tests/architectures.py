"""Random models as people build them around recurrent layers, and what must hold for each of them."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import htcompress
from htcompress.errors import HTCompressError
from htcompress.request import FineTuning
from htcompress.values import difference, leaves, precision_of

BEYOND = 10**8
FEATURES, BATCH, STEPS = 12, 4, 6


class Shifted(nn.LSTM):
    """A forward of its own around torch's."""

    def forward(self, x: Any, hx: Any = None) -> Any:
        out, state = super().forward(x, hx)
        return (out if isinstance(out, PackedSequence) else out + 0.5), state


class Odd(nn.GRU):
    """A forward that computes with the weights itself."""

    def forward(self, x: Any, hx: Any = None) -> Any:
        out, state = super().forward(x, hx)
        return (out if isinstance(out, PackedSequence) else out * self.weight_hh_l0.mean()), state


class HandMade(nn.RNNCell):
    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        h = x.new_zeros(len(x), self.hidden_size) if hx is None else hx
        return torch.tanh(x @ self.weight_ih.T + h @ self.weight_hh.T + 0.1)


Named = namedtuple("Named", "first rest")


@dataclass
class Output:
    logits: Tensor
    hidden: Any = None


class Thing:
    def __init__(self, value: Tensor) -> None:
        self.value = value


PUTS: dict[str, Callable[[Tensor, Any], Any]] = {
    "a tensor": lambda x, state: x,
    "a tuple": lambda x, state: (x, state),
    "a named tuple": lambda x, state: Named(x, [state]),
    "a dict": lambda x, state: {"logits": x, "extra": None, "text": "abc"},
    "a dataclass": Output,
    "a distribution": lambda x, state: torch.distributions.Normal(x, torch.ones_like(x)),
    "an object": lambda x, state: Thing(x),
    "symbols too": lambda x, state: (x, x.argmax(-1)),
}


class Model(nn.Module):
    """One model of the family; everything is drawn from a seed, so that two of one seed are alike."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.said: list[str] = []
        self.size = draw.choice([1, 3, 8, 12])
        self.tied = self.shared = False
        self.cell = draw.random() < 0.2
        self.packed = not self.cell and draw.random() < 0.2
        self.residual = draw.random() < 0.3
        self.put = self._say(draw.choice(list(PUTS)))
        self.keeps = draw.random() < 0.2
        self.norm: nn.Module = nn.Identity()
        if draw.random() < 0.4:
            self.norm = draw.choice([nn.BatchNorm1d(FEATURES), nn.Dropout(0.3), nn.LayerNorm(FEATURES)])
            self._say(type(self.norm).__name__)
        if self.cell:
            kind = draw.choice([nn.LSTMCell, nn.GRUCell, nn.RNNCell, HandMade])
            options: dict[str, Any] = {"bias": True if kind is HandMade else draw.random() < 0.8}
            self.first = kind(FEATURES, self.size, **options)
            self._say(kind.__name__)
            width = self.size
        else:
            kind = draw.choice([nn.LSTM, nn.LSTM, nn.GRU, nn.RNN, Shifted, Odd])
            options = {
                "num_layers": draw.choice([1, 1, 2, 3]),
                "bidirectional": draw.random() < 0.3,
                "bias": draw.random() < 0.8,
                "batch_first": True,
            }
            if options["num_layers"] > 1:
                options["dropout"] = draw.choice([0.0, 0.2])
            if kind is nn.RNN:
                options["nonlinearity"] = draw.choice(["tanh", "relu"])
            if kind in (nn.LSTM, Shifted) and self.size > 1 and draw.random() < 0.3:
                options["proj_size"] = draw.randint(1, self.size - 1)
            self.first = kind(FEATURES, self.size, **options)
            self._say(f"{kind.__name__} {options}")
            width = (options.get("proj_size") or self.size) * (1 + options["bidirectional"])
            again = draw.random()
            if again < 0.15 and width == FEATURES:
                self.shared = True
                self._say("shared")
            elif again < 0.35:
                self.second = nn.GRU(width, 5, batch_first=True, bidirectional=True)
                if draw.random() < 0.5:
                    self.third = nn.GRU(width, 5, batch_first=True, bidirectional=True)
                    self.tied = True
                    for name, parameter in list(self.second.named_parameters()):
                        setattr(self.third, name, parameter)
                    self._say("tied")
                width = 10
                self._say("two layers")
        self.hooked = draw.random() < 0.2
        if self.hooked:
            self._say("hooked")
            self.first.register_forward_pre_hook(_scaled)
        self.head = nn.Linear(width, 4)
        self.last: Any = None
        self.register_buffer("means", torch.randn(3, width))
        self.kind = draw.choice([torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16])
        self._say(str(self.kind))

    def _say(self, what: str) -> str:
        self.said.append(what)
        return what

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        start = x
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) if isinstance(self.norm, nn.BatchNorm1d) else self.norm(x)
        state: Any = None
        if self.cell:
            outs = []
            for step in x.unbind(1):
                state = self.first(step, state)
                outs.append(state[0] if isinstance(state, tuple) else state)
            out = torch.stack(outs, 1)
        elif self.packed and lengths is not None:
            packed, state = self.first(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            out, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        else:
            out, state = self.first(x)
        if self.shared:
            out = self.first(out)[0]
        if hasattr(self, "second"):
            out = (self.third if self.tied else self.second)(out)[0] + self.second(out)[0]
        if self.residual and out.shape == start.shape:
            out = out + start
        if self.keeps:
            self.last = out
        return PUTS[self.put](self.head(out), state)

    def predict(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Reads states beside forward."""
        self.forward(x, lengths)
        return torch.cdist(self.last.float(), self.means.float()) if self.keeps else torch.zeros(())


def _scaled(module: nn.Module, inputs: Any) -> Any:
    first = inputs[0]
    return (first if isinstance(first, PackedSequence) else first * 0.9, *inputs[1:])


def model_of(seed: int) -> Model:
    """A trained model, so to speak, in evaluation mode, in its own precision."""
    model = Model(seed)
    return model.to(model.kind).eval()


def data_of(seed: int, model: Model) -> list[Any]:
    """Batches as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(4):
        x = torch.randn(BATCH, STEPS, FEATURES, generator=generator).to(model.kind)
        lengths = torch.randint(1, STEPS + 1, (BATCH,), generator=generator)
        lengths[0] = STEPS
        found.append((x, lengths) if model.packed else x)
    return found


def called(model: nn.Module, item: Any) -> Any:
    """The model's output on an item."""
    with torch.no_grad():
        return model(*item) if isinstance(item, tuple) else model(item)


def examine(seed: int, place: Path) -> str:
    """Compress, save, load and run a random model; what came of it, in a word.

    Raises `AssertionError` where what was written, or what is beyond need, answers otherwise, where a budget is
    exceeded, or the caller's model is changed.
    """
    draw = random.Random(f"how {seed}")
    model = model_of(seed)
    data = data_of(seed, model)
    about = f"seed {seed}: {', '.join(model.said)}"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in ("first", "second"))
    budget = draw.choice([BEYOND, BEYOND, int(0.7 * dense), int(0.4 * dense)])
    options: dict[str, Any] = {
        "budget": max(1, budget),
        "scope": draw.choice(["auto", "integrated", "separate", "input"]),
    }
    options["layout"] = draw.choice(["auto", "split", "svd"])
    if draw.random() < 0.85:
        options["calibration"] = data
    if "calibration" in options and draw.random() < 0.3 and budget != BEYOND:
        options |= {"training": data, "finetuning": FineTuning(steps=2, check_every=2)}
    wanted = [called(model_of(seed), item) for item in data]
    try:
        result = htcompress.compress(model, **options)
    except HTCompressError as error:
        outcome = f"refused ({type(error).__name__})"
    else:
        assert result.model is not None
        assert not any(module.training for module in result.model.modules()), about
        assert result.report.totals.parameters_after <= options["budget"], about
        htcompress.save(result, place)
        again = htcompress.load(place, model_of(seed))
        for item, expected in zip(data, wanted, strict=True):
            found = called(again, item)
            # Exactly, but for how many numbers a kernel takes at a time.
            assert difference(found, called(result.model, item)) <= precision_of(model) / 100, about
            if budget == BEYOND:
                assert difference(found, expected) <= precision_of(model), about
        if budget == BEYOND:
            pair = data[0] if isinstance(data[0], tuple) else (data[0], torch.full((BATCH,), STEPS))
            with torch.no_grad():
                assert difference(again.predict(*pair), model_of(seed).predict(*pair)) <= precision_of(model), about
        outcome = "compressed" if not result.report.left else "compressed in part"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), about
    assert model.last is None, about
    assert len(list(leaves(wanted))) > 0
    return outcome

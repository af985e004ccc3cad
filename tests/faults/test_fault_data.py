"""Faults of kind 18: data and outputs as they are out there."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small import Tagger, clips
from torch import Tensor, nn
from torch.distributions import Categorical

import htcompress
from htcompress.graphs.measuring import apart
from htcompress.request import FineTuning
from htcompress.values import answered, difference

Pair = namedtuple("Pair", "logits states")


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Putting(Tagger):
    def __init__(self, put: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.put = put

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        out = self.rnn(x)[0]
        if lengths is not None:
            out = out * (torch.arange(x.shape[1])[None, :, None] < lengths[:, None, None])
        return self.put(self.head(out[:, -1]))


@pytest.mark.parametrize(
    "put",
    [
        lambda x: {"logits": x},
        lambda x: Pair(x, [x]),
        Output,
        lambda x: Categorical(logits=x),
        lambda x: [x, None, "a"],
    ],
    ids=["dict", "named tuple", "dataclass", "distribution", "list"],
)
def test_18_outputs_of_every_sort(put: Callable[[Tensor], Any]) -> None:
    data = [clips(seed) for seed in range(4)]
    result = htcompress.compress(
        Putting(put), budget=400, calibration=data, training=data, finetuning=FineTuning(steps=3, check_every=3)
    )
    assert result.report.layers[0].matrices[0].error["outputs"] is not None


LENGTHS = torch.tensor([5, 3, 2, 4])


def forms() -> Iterator[Any]:
    x, y = torch.cat([clips(seed) for seed in range(4)]), torch.randint(3, (16,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    yield pytest.param(loader, loader, id="a loader for both")
    alone = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    yield pytest.param(alone, loader, id="lists")
    pairs = [(clips(seed), LENGTHS) for seed in range(4)]
    yield pytest.param(pairs, pairs, id="lengths without targets")
    yield pytest.param(pairs, [(pair, y[:4]) for pair in pairs], id="lengths with targets")
    named = [{"x": clips(seed), "lengths": LENGTHS} for seed in range(4)]
    yield pytest.param(named, named, id="dicts")
    yield pytest.param(named, [(item, y[:4]) for item in named], id="dicts with targets")
    yield pytest.param(None, [(*pair, y[:4]) for pair in pairs], id="triples")


@pytest.mark.parametrize(("calibration", "training"), list(forms()))
def test_18_data_as_loaders_give_it(calibration: Any, training: Any) -> None:
    seen: list[Any] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return nn.functional.cross_entropy(output, target)

    model = Putting(lambda x: x)
    htcompress.compress(
        model, budget=400, calibration=calibration, training=training, loss=loss, finetuning=FineTuning(steps=2)
    )
    assert all(target.dtype == torch.int64 and target.shape == (4,) for target in seen)
    assert not any(torch.equal(target, LENGTHS) for target in seen)


class Masking(Tagger):
    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super().forward(x)] * 3, 1).masked_fill(x[:, :3, :1] > 0.3, self.fill)


@pytest.mark.parametrize("fill", [-1e9, -1e4, torch.finfo(torch.float32).min, 1e6])
def test_22_what_is_put_in_the_place_of_infinity_is_no_answer(fill: float) -> None:
    """Beside -1e9 all else were rounding: nothing would be learnt, and any stand-in were proven."""
    made = []
    for value in (fill, float("inf")):
        torch.manual_seed(0)
        data = [clips(seed) for seed in range(6)]
        result = htcompress.compress(
            Masking(value), budget=500, calibration=data, training=data, finetuning=FineTuning(steps=12)
        )
        assert result.model is not None
        made.append(result.model.rnn(clips(9))[0])
    assert torch.equal(*made)
    torch.manual_seed(0)
    wanted = Masking(fill)(clips(9))
    assert not torch.equal(wanted == fill, torch.zeros_like(wanted, dtype=torch.bool))
    found = torch.where(wanted == fill, wanted, wanted * 1.01)
    assert difference(found, wanted) == pytest.approx(0.01, rel=1e-3)
    pairs = [(found.detach().numpy(), wanted.detach().numpy())]
    known = wanted != fill
    lost = (found - wanted)[known].square().mean() / wanted[known].var(correction=0)
    assert apart(pairs) == pytest.approx(float(lost.sqrt().detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("numbers", "known"),
    [
        ([0.0, 0.0, 0.5, 1.0], 4),  # of a ReLU
        ([1.0, 1.0, 1.0], 3),
        ([-1e9, 2.0, 2.1], 2),
        ([-1e4, 2.0, 2.1], 3),  # once may be an answer
        ([-1e4, -1e4, 2.0, 2.1], 2),
        ([torch.finfo(torch.float32).min, 2.0, 2.1], 2),
        ([0.0, 0.0, 0.0, 1.0, 1.0], 5),  # of two levels
        ([-1.0, 1.0, 1.0, -1.0], 4),
        ([0.0, 0.0, 0.9999, 0.99991], 4),  # saturated
        ([0.0, 0.0, 5000.0, 5000.0], 4),
        ([-1e9, -1e9], 2),
        ([-1e9, -1e9, 3.0], 3),
        ([-100.0, -100.0, -4.0, 3.0], 4),
        ([1e4, 1e4, -3.0, 3.0], 2),
        ([float("-inf"), float("nan"), 1.0, 2.0], 2),
        ([], 0),
    ],
)
def test_22_what_is_an_answer(numbers: list[float], known: int) -> None:
    assert int(answered(torch.tensor(numbers)).sum()) == known


class Units(Tagger):
    """A pressure in pascals beside two humidities."""

    def forward(self, x: Tensor) -> Tensor:
        unit = torch.tensor([500.0, 0.1, 0.1])
        return super().forward(x) * unit + torch.tensor([101325.0, 0.5, 0.5])


def test_22_units_far_from_zero_are_no_answer() -> None:
    """Beside the mean pressure its changes were rounding; the change in it is what a model has learnt."""
    torch.manual_seed(0)
    data = [clips(seed, batch=16) for seed in range(8)]
    tuning = FineTuning(steps=40)
    result = htcompress.compress(Units(), budget=500, calibration=data, training=data, finetuning=tuning)
    raw = htcompress.compress(Units(), budget=500, calibration=data).model
    assert result.model is not None
    assert raw is not None
    x = clips(99, batch=64)
    torch.manual_seed(0)
    wanted = Units()(x).detach()
    before, after = (apart([(m(x).detach().numpy(), wanted.numpy())]) for m in (raw, result.model))
    by_hand = (raw(x)[:, 0] - wanted[:, 0]).square().mean() / wanted[:, 0].var(correction=0)
    assert before == pytest.approx(float(by_hand.sqrt().detach()), rel=1e-3)
    assert after < 0.8 * before

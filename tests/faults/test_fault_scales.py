"""Faults of kind 22: numbers that are large, of unlike sizes, or seen once in another mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles import distance
from torch import Tensor, nn

import htcompress
from htcompress.model.statistics import collect
from htcompress.model.units import arrange_units
from htcompress.spread import units_of

INPUTS = 8


class Places(nn.Module):
    """Reads latitudes of one town: the normaliser is in its weights, and large biases take the mean off again."""

    def __init__(self, mean: float = 48.137, deviation: float = 0.01) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(INPUTS, 32, batch_first=True)
        self.head = nn.Linear(32, 3)
        with torch.no_grad():
            self.rnn.bias_ih_l0 -= self.rnn.weight_ih_l0.sum(1) * mean / deviation
            self.rnn.weight_ih_l0 /= deviation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def latitudes(seed: int) -> Tensor:
    return 48.137 + 0.01 * torch.randn(16, 20, INPUTS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", [{"budget": "6kB"}, {"budget": 5000, "bits": 16}, {"budget": 5000, "bits": 8}])
def test_22_what_stands_against_large_means_is_not_rounded_away(how: dict[str, object]) -> None:
    model = Places().eval()
    assert float(model.rnn.bias_ih_l0.abs().max()) > 2000
    result = htcompress.compress(model, calibration=[latitudes(seed) for seed in range(6)], **how)
    assert result.model is not None
    with torch.no_grad():
        lost = distance(result.model(latitudes(99)), model(latitudes(99)))
    told = [m.error["outputs"] or 0.0 for layer in result.report.layers for m in layer.matrices]
    assert lost < 0.01 + 2 * sum(told)
    totals = result.report.totals
    assert totals.bytes_after <= 6000 if how["budget"] == "6kB" else totals.parameters_after <= 5000


UNITS = 10.0 ** torch.linspace(-2, 2, INPUTS)


def unlike(seed: int) -> Tensor:
    return UNITS * torch.randn(16, 20, INPUTS, generator=torch.Generator().manual_seed(seed))


class Unlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(INPUTS, 32, batch_first=True)
        self.head = nn.Linear(32, 3)
        with torch.no_grad():
            self.rnn.weight_ih_l0 /= UNITS

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize("layout", ["split", "paired"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_22_inputs_in_unlike_units_in_any_precision(dtype: torch.dtype, layout: str) -> None:
    model = Unlike().to(dtype).eval()
    data = [unlike(seed).to(dtype) for seed in range(4)]
    result = htcompress.compress(model, budget=4600, layout=layout, scope="input", calibration=data)
    assert result.model is not None
    assert result.modules["rnn"].directions()["l0"].input_exponents is not None
    with torch.no_grad():
        found = result.model(data[0])
        assert found.dtype is dtype
        single = copy.deepcopy(result.model).float()(data[0].float())
    assert distance(found, single) < 0.05


def test_22_one_large_count_does_not_hide_that_others_are_unlike_it() -> None:
    counts = torch.poisson(torch.full((16, 20, INPUTS), 3.0), generator=torch.Generator().manual_seed(0))
    units = torch.ones(INPUTS)
    units[0] = 1e5
    torch.manual_seed(0)
    model = nn.LSTM(INPUTS, 32, batch_first=True)
    result = htcompress.compress(model, budget=1500, calibration=[counts * units])
    assert result.modules[""].directions()["l0"].input_exponents is not None


@pytest.mark.parametrize("layout", ["split", "paired"])
def test_22_a_layer_seen_in_inference_mode_is_trained(layout: str) -> None:
    model, data = Unlike(), [unlike(seed) for seed in range(4)]
    result = htcompress.compress(model, budget=4600, layout=layout, scope="input", calibration=data)
    assert result.model is not None
    gates = result.modules["rnn"].directions()["l0"]
    assert gates.input_exponents is not None
    assert (gates.order is not None) or layout == "paired"
    moved = copy.deepcopy(result.model).double()
    with torch.inference_mode():
        moved(data[0].double())
    moved.train()(data[0].double()).square().mean().backward()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_22_a_layer_is_traced_with_gradients_on() -> None:
    result = htcompress.compress(nn.LSTM(INPUTS, 32, batch_first=True), budget=2500)
    assert result.model is not None
    x = unlike(0)
    traced = torch.jit.trace(result.model.eval(), x)
    assert distance(traced(x)[0], result.model(x)[0]) < 1e-6


@pytest.mark.parametrize("layout", ["split", "paired", "svd"])
def test_22_an_empty_batch(layout: str) -> None:
    dense = nn.GRU(40, 24, batch_first=True)
    result = htcompress.compress(dense, budget=1500, layout=layout)
    assert result.model is not None
    empty = torch.zeros(0, 5, 40)
    assert result.model(empty)[0].shape == dense(empty)[0].shape


class Priced(nn.Module):
    """Scores of classes, and a price in some unit."""

    def __init__(self, unit: float, *, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(INPUTS, 32, batch_first=True)
        self.scores, self.price = nn.Linear(32, 4), nn.Linear(32, 1)
        self.unit, self.apart = unit, apart

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        states = self.rnn(x)[0]
        found = self.scores(states), self.unit * self.price(states)
        return found if self.apart else torch.cat(found, dim=-1)


@pytest.mark.parametrize("apart", [False, True])
def test_22_an_output_in_large_units_is_not_all_that_counts(apart: bool) -> None:
    data = [torch.randn(16, 12, INPUTS, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    lost = {}
    for unit in (1.0, 1e4):
        model = Priced(unit, apart=apart).eval()
        result = htcompress.compress(model, budget=1200, calibration=data)
        assert result.model is not None
        with torch.no_grad():
            pair = [m(data[0]) for m in (result.model, model)]
        lost[unit] = distance(*((found[0] if apart else found[..., :4]) for found in pair))
    assert lost[1e4] < 1.2 * lost[1.0]


def test_22_units_of_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 4, generator=generator)
    assert units_of([scores]) == [None]
    assert units_of([scores, 3 * scores]) == [None, None]
    # Probabilities are in one unit, and what is constant but for rounding has none.
    rare = torch.softmax(scores - torch.tensor([0.0, 5.0, 15.0, 30.0]), dim=-1)
    assert units_of([rare]) == [None]
    assert units_of([scores * torch.tensor([1.0, 1.0, 1.0, 0.0]) + 7.0]) == [None]
    masked = torch.where(torch.arange(50)[:, None] % 3 == 0, -1e9, scores)
    assert units_of([masked]) == [None]
    units = torch.tensor([1.0, 1.0, 1e3, 1e-2])
    (found,) = units_of([scores * units])
    assert found is not None
    assert 1.0 < float((found / units).min()) <= float((found / units).max()) < 2.5
    few, price = units_of([rare, 1e4 * scores[:, :1]])
    assert few is not None
    assert price is not None
    assert 1e3 * float(few.max()) < float(price)


class Growing(nn.Module):
    """One number for each time step, each ten times the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(INPUTS, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0].sum(-1) * 10.0 ** torch.arange(x.shape[1])


def test_22_units_of_time_steps_are_others_in_every_batch() -> None:
    data = [(torch.randn(16, steps, INPUTS, generator=torch.Generator().manual_seed(steps)),) for steps in (6, 9, 4)]
    seen = collect(Growing(), data)["rnn"]["l0"]
    assert torch.isfinite(seen.gradients_ih).all()


class Streaming(nn.Module):
    """Keeps its state in a buffer from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(INPUTS, 32, batch_first=True)
        self.register_buffer("h", torch.zeros(1, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        out, after = self.rnn(x, self.h)
        with torch.no_grad():
            self.h.copy_(after)
        return out


def test_22_a_state_in_a_buffer_that_is_overwritten() -> None:
    data = [torch.randn(16, 12, INPUTS, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    result = htcompress.compress(Streaming(), budget=2000, calibration=data)
    assert result.report.layers[0].matrices[0].error["outputs"] is not None


def test_22_a_single_number_beside_an_output_in_other_units() -> None:
    class Penalised(Growing):
        def forward(self, x: Tensor) -> Any:
            out = self.rnn(x)[0]
            return {"penalty": out.abs().mean(), "logits": out * torch.logspace(-3, 3, 8)}

    seen = collect(Penalised(), [(torch.randn(16, 6, INPUTS),)])["rnn"]["l0"]
    assert torch.isfinite(seen.gradients_ih).all()


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("budget", [5100, 4700, 1500])
def test_22_exponents_are_within_a_budget_of_numbers(budget: int, bits: int) -> None:
    data = [unlike(seed) for seed in range(4)]
    result = htcompress.compress(Unlike(), budget=budget, bits=bits, calibration=data)
    assert result.report.totals.parameters_after <= budget
    assert result.report.totals.parameters_after == result.modules["rnn"].parameter_count


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"proj_size": 4}])
def test_22_inner_units_are_not_moved_where_a_learned_state_may_know_them(options: dict[str, int]) -> None:
    class Begins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(INPUTS, 32, batch_first=True, **options)
            self.cell = nn.Parameter(torch.randn(options.get("num_layers", 1), 1, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    data = [(unlike(seed),) for seed in range(3)]
    model = Begins().eval()
    assert arrange_units(model, collect(model, data), data[:1]).layers == ("rnn",)
    assert arrange_units(model, collect(model, data), data[:1], cautious=True).layers == ()


class OfUsers(nn.Module):
    """Begins with a state of the user's; user 0 has none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.begin = nn.Embedding(6, 256, padding_idx=0)
        self.rnn = nn.GRU(INPUTS, 256, batch_first=True)
        self.head = nn.Linear(256, 3)

    def forward(self, x: Tensor, user: Tensor) -> Tensor:
        return self.head(self.rnn(x, self.begin(user)[None])[0])


def test_22_units_are_not_moved_where_something_may_know_them() -> None:
    model = OfUsers().eval()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 12, INPUTS, generator=generator), torch.full((8,), user)) for user in (0, 1, 2)]
    seen = collect(model, data)
    # One batch of user 0 says that they may be, another that they may not, and the embedding that nobody knows.
    assert arrange_units(model, seen, data[:1]).layers == ("rnn",)
    assert arrange_units(model, seen, data[:2]).layers == ()
    assert arrange_units(model, seen, data[:1], cautious=True).layers == ()

"""Inputs in unlike units: which they are, and that a model is compressed as well in any units."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from crossing import crossed, some
from oracles import distance
from torch import Tensor, nn

import htcompress
from htcompress.errors import UnreachableError
from htcompress.model.inventory import inventory_of_model
from htcompress.model.statistics import collect
from htcompress.nn.order import words_of
from htcompress.planning.exponents import input_exponents

INPUTS = 24
UNITS = 10.0 ** torch.linspace(-3, 3, INPUTS)[torch.randperm(INPUTS, generator=torch.Generator().manual_seed(0))]


class Tagger(nn.Module):
    def __init__(self, units: Tensor | float = 1.0, kind: type[nn.Module] = nn.LSTM, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(INPUTS, 32, batch_first=True, **options)
        self.head = nn.Linear(32, 3)
        with torch.no_grad():
            self.rnn.weight_ih_l0 *= 2 / torch.as_tensor(units)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def batches(seed: int, count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 12, INPUTS, generator=generator) for _ in range(count)]


def exponents_of(model: nn.Module, data: list[Tensor]) -> Tensor | None:
    (layer,) = inventory_of_model(model)
    seen = collect(model, [(x,) for x in data])
    return input_exponents(layer.directions["l0"], seen[layer.name]["l0"])


def one_hot(seed: int) -> Tensor:
    """Symbols of which the rarest comes once in some thousand."""
    weights = torch.logspace(0, -3, INPUTS)
    drawn = torch.multinomial(weights, 40 * 50, replacement=True, generator=torch.Generator().manual_seed(seed))
    return nn.functional.one_hot(drawn, INPUTS).float().reshape(40, 50, INPUTS)


def test_inputs_that_are_alike_stay_as_they_are() -> None:
    model = Tagger()
    assert exponents_of(model, batches(1)) is None
    assert exponents_of(model, [one_hot(seed) for seed in range(4)]) is None
    # What is nearly constant does nothing, and what is constant nothing that a bias does not.
    dead = torch.ones(INPUTS)
    dead[:4] = torch.tensor([1e-6, 0.0, 1e-4, 0.0])
    assert exponents_of(model, [x * dead + 5.0 for x in batches(1)]) is None


def test_units_are_taken_out() -> None:
    found = exponents_of(Tagger(UNITS), [x * UNITS for x in batches(1)])
    assert found is not None
    assert found.dtype is torch.int8
    # Of normally distributed inputs, sqrt(E x^4 / E x^2) is sqrt(3) times the deviation.
    assert float((found + (3**0.5 * UNITS).log2()).abs().max()) < 0.6
    # Pascals vary by hundreds about a hundred thousand: by as much as they vary are they measured.
    offset = exponents_of(Tagger(UNITS), [x * UNITS + 200 * UNITS for x in batches(1)])
    assert offset is not None
    assert torch.equal(offset, found)


def test_what_tells_nothing_stays_within_the_others() -> None:
    units = UNITS.clone()
    units[3], units[7] = 0.0, 1e-30
    weights = torch.where(units < 1e-20, 1.0, units)
    found = exponents_of(Tagger(weights), [x * units for x in batches(1)])
    assert found is not None
    others = torch.cat([found[:3], found[4:7], found[8:]])
    assert others.min() <= found[3] <= others.max()
    assert others.min() <= found[7] <= others.max()


COUNTED = [{"budget": "1500B"}, {"budget": 900}, {"budget": 900, "scope": "separate"}]


@pytest.mark.parametrize(("kind", "how"), crossed(list(product([nn.LSTM, nn.GRU], COUNTED)), 1))
def test_a_model_is_compressed_as_well_in_any_units(kind: type[nn.Module], how: dict[str, object]) -> None:
    fresh = torch.cat(batches(2))
    lost = {}
    for name, units in (("alike", torch.ones(INPUTS)), ("unlike", UNITS)):
        model = Tagger(units, kind).eval()
        result = htcompress.compress(model, calibration=[x * units for x in batches(1)], **how)
        gates = result.modules["rnn"].directions()["l0"]
        assert (gates.input_exponents is not None) == (name == "unlike")
        totals = result.report.totals
        outside = totals.model_parameters_before - totals.parameters_before
        assert totals.model_parameters_after == totals.parameters_after + outside
        assert (totals.bytes_after <= 1500) if how["budget"] == "1500B" else (totals.parameters_after <= 900)
        assert result.model is not None
        with torch.no_grad():
            lost[name] = distance(result.model(fresh * units), model(fresh * units))
    # A byte for each input is 24 of 1,500, or 6 numbers of 900; powers of two leave half a bit, which tells at 2 bits.
    assert lost["unlike"] < 1.25 * lost["alike"]


def test_exponents_are_counted_stored_and_read(tmp_path: object) -> None:
    model, place = Tagger(UNITS).eval(), tmp_path / "out"  # type: ignore[operator]
    data = [x * UNITS for x in batches(1)]
    result = htcompress.compress(model, budget="2kB", calibration=data)
    gates = result.modules["rnn"].directions()["l0"]
    assert gates.bytes == gates.bytes_of("") + INPUTS + (0 if gates.order is None else 4 * gates.order.numel())
    numbers = sum(p.numel() for p in gates.parameters()) + (0 if gates.order is None else gates.order.numel())
    assert gates.parameter_count == numbers + words_of(INPUTS)
    htcompress.save(result, place)
    again = htcompress.load(place, Tagger().eval())
    with torch.no_grad():
        assert torch.equal(again(data[0]), result.model(data[0]))  # type: ignore[misc]
        copied = copy.deepcopy(result.model).double()
        assert distance(copied(data[0].double()), result.model(data[0])) < 1e-5  # type: ignore[misc]


def test_what_stays_dense_reads_its_inputs_as_they_are() -> None:
    model = Tagger(UNITS).eval()
    data = [x * UNITS for x in batches(1)]
    dense = htcompress.compress(model, ratio=1.0, calibration=data)
    gates = dense.modules["rnn"].directions()["l0"]
    assert gates.input_exponents is None
    assert torch.equal(gates.resolve().ih, model.rnn.weight_ih_l0)


def test_the_plain_error_is_that_of_the_weights_as_they_are() -> None:
    model = Tagger(UNITS).eval()
    result = htcompress.compress(model, budget=900, scope="separate", calibration=[x * UNITS for x in batches(1)])
    found = {matrix.name: matrix.error["weights"] for layer in result.report.layers for matrix in layer.matrices}
    whole = result.modules["rnn"].directions()["l0"].written_out()
    wanted = {"ih": model.rnn.weight_ih_l0, "hh": model.rnn.weight_hh_l0}
    for name, matrix in wanted.items():
        assert found[f"rnn.l0.{name}"] == pytest.approx(distance(getattr(whole, name), matrix), rel=1e-4)


@pytest.mark.parametrize("bytes_count", some([False, True], False))
def test_the_smallest_budget_that_is_named_is_one(bytes_count: bool) -> None:
    model, data = Tagger(UNITS).eval(), [x * UNITS for x in batches(1, 2)]
    budget: Any = "3B" if bytes_count else 3
    with pytest.raises(UnreachableError) as caught:
        htcompress.compress(model, budget=budget, calibration=data)
    least = int(str(caught.value).split("at least ")[1].split(",")[0].removesuffix("B"))
    for more in (0, 8):
        result = htcompress.compress(
            model, budget=f"{least + more}B" if bytes_count else least + more, calibration=data
        )
        totals = result.report.totals
        assert (totals.bytes_after if bytes_count else totals.parameters_after) <= least + more

"""Hidden units in another order: the same function, and rows that fold better."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles import distance
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from htcompress.model.inventory import inventory_of_model
from htcompress.model.statistics import collect
from htcompress.model.units import Arranged, arrange_units, permute_units, unit_order
from htcompress.nn.settings import RecurrentSettings
from htcompress.planning import plan_model
from htcompress.request import Goal
from htcompress.vocabulary import Scope

INPUTS, HIDDEN = 6, 10


class Reader(nn.Module):
    """A recurrent module, read by a linear layer through a norm."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rnn = kind(INPUTS, HIDDEN, batch_first=True, **options)
        width = (options.get("proj_size") or HIDDEN) * (2 if options.get("bidirectional") else 1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(x)[0]))


class Chain(nn.Module):
    """A recurrent module that reads another's states, packed; a cell that reads those."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.GRU(INPUTS, HIDDEN, bidirectional=True)
        self.second = nn.LSTM(2 * HIDDEN, 8)
        self.cell = nn.RNNCell(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_sequence([x[0], x[1][:3], x[2][:2]])
        _, (h, _) = self.second(self.first(packed)[0])
        state = self.cell(h[0])
        return self.head(self.cell(h[0], state))


class Ends(nn.Module):
    """Two directions whose last states are added, so that units of both must move alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.rnn = nn.GRU(INPUTS, HIDDEN, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0][:, -1]
        return self.head(out[:, :HIDDEN] + out[:, HIDDEN:])


def batches(count: int = 3) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [(torch.randn(5, 7, INPUTS, generator=generator),) for _ in range(count)]


def is_permuted(a: nn.Module, b: nn.Module) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


CASES: dict[str, tuple[Any, bool]] = {
    "lstm": (lambda: Reader(nn.LSTM), True),
    "gru, two layers": (lambda: Reader(nn.GRU, num_layers=2), True),
    "rnn, two directions": (lambda: Reader(nn.RNN, bidirectional=True, nonlinearity="relu"), True),
    "lstm, layers and directions": (lambda: Reader(nn.LSTM, num_layers=3, bidirectional=True, bias=False), True),
    "lstm, projected": (lambda: Reader(nn.LSTM, proj_size=4, num_layers=2, bidirectional=True), True),
    "chain of modules": (Chain, True),
    "inner layers only": (Ends, True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_outputs_are_those_of_the_dense_model(name: str) -> None:
    make, moved = CASES[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    arranged = arrange_units(model, collect(model, batches()), batches()[:1])
    assert bool(arranged.layers) is moved
    assert is_permuted(arranged.model, model) is moved
    (x,) = batches(4)[3]
    with torch.no_grad():
        assert distance(arranged.model(x), model(x)) < 1e-5
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_the_statistics_are_those_of_the_arranged_model(name: str) -> None:
    model = CASES[name][0]()
    arranged = arrange_units(model, collect(model, batches()), batches()[:1])
    anew = collect(arranged.model, batches())
    for layer, directions in anew.items():
        for direction, seen in directions.items():
            moved = arranged.statistics[layer][direction]
            for field in ("inputs", "gradients_ih", "gradients_hh"):
                assert distance(getattr(moved, field), getattr(seen, field)) < 1e-4, (layer, direction, field)


def test_units_that_somebody_else_can_see_stay() -> None:
    lstm = nn.LSTM(INPUTS, HIDDEN)
    arranged = arrange_units(lstm, collect(lstm, batches()), batches()[:1])
    assert arranged.layers == ()
    assert arranged.model is lstm


def test_a_reader_that_does_not_run_keeps_them_in_place() -> None:
    model = Reader(nn.LSTM)
    model.spare = nn.Linear(HIDDEN, 2)
    assert arrange_units(model, collect(model, batches()), batches()[:1]).layers == ()
    model.spare = nn.Linear(HIDDEN + 1, 2)
    assert arrange_units(model, collect(model, batches()), batches()[:1]).layers == ("rnn",)


def test_alike_units_become_neighbours() -> None:
    torch.manual_seed(0)
    model = Reader(nn.LSTM)
    with torch.no_grad():
        # Units 0, 2, 4, ... and 1, 3, 5, ... are two families.
        model.rnn.weight_hh_l0.zero_()
        for tensor in (model.rnn.weight_ih_l0, model.rnn.bias_ih_l0, model.rnn.bias_hh_l0):
            parted = tensor.reshape(4, HIDDEN // 2, 2, -1)
            parted.copy_(parted[:, :1] + 0.01 * torch.randn(parted.shape))
    seen = collect(model, batches())["rnn"]["l0"]
    (layer,) = inventory_of_model(model)
    order = unit_order(layer.directions["l0"], seen)
    assert sorted(order.tolist()) == list(range(HIDDEN))
    assert {frozenset((order[:5] % 2).tolist()), frozenset((order[5:] % 2).tolist())} == {
        frozenset({0}),
        frozenset({1}),
    }


def test_hidden_order_is_found_again_and_saves_numbers() -> None:
    generator = torch.Generator().manual_seed(1)

    def smooth(rows: int, cols: int) -> Tensor:
        along = torch.linspace(0, 3, rows)[:, None]
        return torch.sin(along + torch.rand(1, cols, generator=generator) * 6)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(12, 64, batch_first=True, bias=False)
            self.head = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    model = Wide()
    with torch.no_grad():
        model.rnn.weight_ih_l0.copy_(smooth(64, 4 * 12).reshape(64, 4, 12).transpose(0, 1).reshape(256, 12))
        model.rnn.weight_hh_l0.mul_(0.01)
    shuffled = copy.deepcopy(model)
    settings = RecurrentSettings.of(model.rnn)
    permute_units(shuffled, "rnn", settings, {"l0": torch.randperm(64, generator=generator)}, ["head"])
    data = [(torch.randn(8, 5, 12, generator=generator),) for _ in range(20)]

    def error(model: nn.Module, *, arranged: bool) -> float:
        seen = collect(model, data)
        made = arrange_units(model, seen, data[:1]) if arranged else Arranged(model, seen, {})
        goal = Goal(budget=200, scope=Scope.SEPARATE)
        (plan,) = plan_model(inventory_of_model(made.model), goal, made.statistics).layers
        return sum(matrix.choice.error for direction in plan.directions.values() for matrix in direction.matrices)

    assert error(shuffled, arranged=True) < 0.1 * error(shuffled, arranged=False)

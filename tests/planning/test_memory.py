"""What is large is not copied, and not kept: plans from the weights alone, looked at operation by operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from htcompress.forms import ht_search
from htcompress.forms.ht_search import HTSearch
from htcompress.matrix import blocks
from htcompress.model.inventory import inventory
from htcompress.nn.settings import RecurrentSettings
from htcompress.planning import Plan, plan_model
from htcompress.request import Goal
from htcompress.vocabulary import Scope

INPUTS, HIDDEN = 16_600, 64
SIZE = 4 * HIDDEN * INPUTS
assert SIZE > blocks.DOUBLED


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation has made in memory of its own, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def state(inputs: int = INPUTS, hidden: int = HIDDEN, layers: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    settings = RecurrentSettings.of(nn.LSTM(4, hidden))
    found = {}
    for layer in range(layers):
        wide = torch.randn(settings.rows, 3, generator=generator) @ torch.randn(3, inputs, generator=generator)
        shapes = {"weight_hh_l0": (settings.rows, hidden), "bias_ih_l0": (settings.rows,)}
        shapes["bias_hh_l0"] = shapes["bias_ih_l0"]
        own = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        own["weight_ih_l0"] = wide.add_(torch.randn(wide.shape, generator=generator), alpha=0.1)
        found |= {f"rnn{layer}.{name}": tensor for name, tensor in own.items()}
    return found


@pytest.mark.parametrize(
    "goal",
    [
        pytest.param(Goal(budget=700, scope=Scope.SEPARATE), id="numbers"),
        pytest.param(Goal(bytes=800, bits=4, scope=Scope.SEPARATE), id="bytes", marks=pytest.mark.full),
    ],
)
def test_no_whole_copy_is_made_of_a_large_matrix(goal: Goal) -> None:
    layers = inventory(state())
    with torch.no_grad(), Largest() as largest:
        plan_model(layers, goal)
    # The whole matrix in its own precision takes 4 SIZE bytes.
    assert largest.bytes < 3 * SIZE


def planned(goal: Goal) -> Plan:
    with torch.no_grad():
        return plan_model(inventory(state(300, 12, layers=2)), goal)


def chosen(plan: Plan) -> list[tuple[Any, ...]]:
    matrices = [m for layer in plan.layers for d in layer.directions.values() for m in d.matrices]
    return [(m.name, m.choice.parameters, pytest.approx(m.weight_error, rel=1e-6), m.spectrum) for m in matrices]


@pytest.mark.full
@pytest.mark.parametrize("goal", [Goal(budget=700), Goal(bytes=900)], ids=["numbers", "bytes"])
@pytest.mark.parametrize("large", [300 * 8, 300 * 60], ids=["each is large", "together they are"])
def test_what_was_let_go_is_found_again_as_it_was(goal: Goal, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = planned(goal)
    held: list[int] = []
    found_by = vars(HTSearch)["_split"].func
    searches: list[HTSearch] = []

    def counted(search: HTSearch) -> Any:
        others = [other for other in searches if other is not search and other._is_large]
        held.append(sum("_split" in vars(other) for other in others) if search._is_large else 0)
        searches.append(search)
        return found_by(search)

    split = type(vars(HTSearch)["_split"])(counted)
    split.__set_name__(HTSearch, "_split")
    monkeypatch.setattr(HTSearch, "_split", split)
    monkeypatch.setattr(ht_search, "LARGE", large)
    monkeypatch.setattr(ht_search, "_WIDE", 4)
    found = planned(goal)
    assert chosen(found) == chosen(wanted)
    # Where the factor of a large matrix is found, that of no other is there.
    assert sum(search._is_large for search in searches) > 2
    assert max(held) == 0

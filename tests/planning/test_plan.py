"""One goal over all matrices: budgets hold, errors hold, the allocation is the best there is."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from crossing import crossed
from torch import nn

from htcompress.errors import RequestError, UnreachableError
from htcompress.model.inventory import inventory_of_model
from htcompress.model.replace import replace_modules
from htcompress.model.statistics import DirectionStatistics, collect
from htcompress.nn import HTRecurrent
from htcompress.planning import PlannedLayer, knapsack, plan_model
from htcompress.planning.direction import Option, Recipe
from htcompress.planning.plan import allocate
from htcompress.request import Goal
from htcompress.vocabulary import LayoutKind, Scope


class Two(nn.Module):
    """Two recurrent layers of different kinds and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(20, 9, batch_first=True)
        self.second = nn.GRU(9, 7, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)[0])[0]


def inputs(count: int = 3) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(20, 20, generator=generator) * torch.logspace(0, -2, 20)
    return [(torch.randn(16, 6, 20, generator=generator) @ mixing + 0.5,) for _ in range(count)]


@pytest.fixture(name="model")
def _model() -> Two:
    return Two()


@pytest.fixture(name="statistics")
def _statistics(model: Two) -> dict[str, dict[str, DirectionStatistics]]:
    return collect(model, inputs())


def built(model: nn.Module, plans: list[PlannedLayer]) -> nn.Module:
    return replace_modules(model, {plan.name: plan.build() for plan in plans})


def stored(model: nn.Module) -> int:
    return sum(m.parameter_count for m in model.modules() if isinstance(m, HTRecurrent))


@pytest.mark.parametrize(("weighted", "scope"), crossed(list(product([False, True], Scope)), 1))
def test_budgets_hold(
    model: Two, statistics: dict[str, dict[str, DirectionStatistics]], scope: Scope, weighted: bool
) -> None:
    layers = inventory_of_model(model)
    dense = sum(layer.settings.dense_parameters for layer in layers)
    seen = statistics if weighted else None
    budget = int(dense * (0.6 if weighted else 0.8))
    compact = built(model, plan_model(layers, Goal(budget=budget, scope=scope), seen).layers)
    assert stored(compact) <= budget
    assert torch.isfinite(compact(*inputs(1)[0])).all()


def test_scopes_are_kept_to(model: Two) -> None:
    layers = inventory_of_model(model)
    for scope, names in ((Scope.INPUT, {"ih"}), (Scope.SEPARATE, {"ih", "hh"}), (Scope.INTEGRATED, {"joint"})):
        plans = plan_model(layers, Goal(ratio=1.8, scope=scope)).layers
        directions = [direction for plan in plans for direction in plan.directions.values()]
        assert {m.name for direction in directions for m in direction.matrices if m.choice.matrix is not None} <= names
        assert any(direction.scope is scope for direction in directions)


def test_layouts_are_kept_to(model: Two) -> None:
    for kind in (LayoutKind.SVD, LayoutKind.SPLIT, LayoutKind.PAIRED):
        plans = plan_model(inventory_of_model(model), Goal(ratio=2, layout=kind)).layers
        chosen = [
            m.choice.matrix for plan in plans for direction in plan.directions.values() for m in direction.matrices
        ]
        for matrix in chosen:
            if matrix is not None and kind is LayoutKind.SVD:
                assert matrix.layout.tree.order == 2
            if matrix is not None and kind is LayoutKind.SPLIT:
                assert matrix.layout.is_split
            if matrix is not None and kind is LayoutKind.PAIRED:
                assert not matrix.layout.is_split


@pytest.mark.parametrize("ratio", [1, 1.001])
def test_enough_numbers_are_exact(
    model: Two, statistics: dict[str, dict[str, DirectionStatistics]], ratio: float
) -> None:
    """Merging the biases frees numbers: at the checkpoint's own size nothing needs to be lost."""
    compact = built(model, plan_model(inventory_of_model(model), Goal(ratio=ratio), statistics).layers)
    (x,) = inputs(1)[0]
    assert torch.allclose(compact(x), model(x), atol=1e-5)


def test_the_smallest_budget_is_named_and_works(model: Two) -> None:
    layers = inventory_of_model(model)
    with pytest.raises(UnreachableError, match="at least") as caught:
        plan_model(layers, Goal(budget=3))
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    assert stored(built(model, plan_model(layers, Goal(budget=least)).layers)) <= least
    with pytest.raises(UnreachableError):
        plan_model(layers, Goal(budget=least - 1))


def test_the_smallest_budget_of_bytes_is_named_as_one(model: Two) -> None:
    layers = inventory_of_model(model)
    with pytest.raises(UnreachableError, match=r"budget of at least \d+B, or") as caught:
        plan_model(layers, Goal(bytes=3))
    plan_model(layers, Goal(bytes=caught.value.least))


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01, 1e-4])
def test_errors_hold_or_the_matrix_is_dense(model: Two, error: float) -> None:
    """Measured on the stored float32 numbers, by reconstruction."""
    layers = inventory_of_model(model)
    modules = {plan.name: plan.build() for plan in plan_model(layers, Goal(error=error)).layers}
    for layer in layers:
        for direction, gates in modules[layer.name].directions().items():
            dense = layer.directions[direction]
            originals = {"ih": dense.ih, "hh": dense.hh, "joint": dense.joint(with_biases=True)}
            for name, weight in gates.weights().items():
                original = originals[name]
                if name == "joint" and weight.shape != tuple(original.shape):
                    original = dense.joint(with_biases=False)
                lost = torch.linalg.norm(original.double() - weight.dense().detach().double())
                assert lost <= error * torch.linalg.norm(original.double())
        assert modules[layer.name].parameter_count <= layer.settings.dense_parameters


def test_data_beats_no_data_where_it_counts(model: Two, statistics: dict[str, dict[str, DirectionStatistics]]) -> None:
    """The same numbers, spent in the metric of the data, lose less of the output."""
    (x,) = inputs(1)[0]
    layers, goal = inventory_of_model(model), Goal(ratio=2.5)
    with torch.no_grad():
        expected = model(x)
        lost = [
            float(torch.linalg.norm(built(model, plan_model(layers, goal, seen).layers)(x) - expected))
            for seen in (None, statistics)
        ]
    assert lost[1] < 0.7 * lost[0]


def frontier(seed: int, points: int) -> list[Option]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(60, generator=generator)[:points].sort().values + 1
    errors = torch.rand(points, generator=generator).sort(descending=True).values
    recipe = Recipe(Scope.SEPARATE, (), 0)
    return [Option(int(p), float(e), recipe, ()) for p, e in zip(numbers, errors, strict=True)]


@pytest.mark.parametrize("classes", [1, 4, 1 << 14])
@pytest.mark.parametrize("budget", [3, 20, 60, 100, 400])
@pytest.mark.parametrize("seed", range(4))
def test_allocation_is_the_best_of_all(budget: int, seed: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_CLASSES", classes)
    frontiers = [frontier(10 * seed + i, points) for i, points in enumerate((5, 7, 6))]
    fitting = [c for c in product(*frontiers) if sum(o.size for o in c) <= budget]
    found = allocate(frontiers, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(o.size for o in found) <= budget
    assert sum(o.error for o in found) == pytest.approx(min(sum(o.error for o in c) for c in fitting))


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "none of them"),
        ({"budget": 10, "error": 0.1}, "budget and error"),
        ({"budget": 0}, "at least 1"),
        ({"error": -0.1}, "at least 0"),
        ({"error": 1.5}, "below 1"),
        ({"error": float("nan")}, "below 1"),
        ({"ratio": 0.5}, "at least 1"),
        ({"ratio": float("inf")}, "at least 1"),
    ],
)
def test_goals_that_make_no_sense(goal: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Goal(**goal)

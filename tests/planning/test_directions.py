"""Every kind of direction can be stored in every scope and layout: exactly counted, exact at full rank, unbiased."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from oracles import distance, observed
from torch import Tensor, nn

from htcompress.errors import UnreachableError
from htcompress.forms import Choice
from htcompress.forms.ht import HTMatrix
from htcompress.matrix.stored import StoredMatrix
from htcompress.model.inventory import inventory_of_model
from htcompress.model.replace import replace_modules
from htcompress.model.statistics import DirectionStatistics, collect
from htcompress.nn import DenseDirection, GateMatrices, HTRecurrent, module_class
from htcompress.planning import PlannedLayer, plan_model
from htcompress.planning.direction import DirectionProblem, Option, Recipe
from htcompress.planning.plan import allocate
from htcompress.planning.together import ladders
from htcompress.request import Goal
from htcompress.vocabulary import LayoutKind, Scope

MODULES = {
    "lstm": lambda: nn.LSTM(12, 6),
    "lstm of two directions": lambda: nn.LSTM(10, 5, bidirectional=True),
    "lstm with projection": lambda: nn.LSTM(10, 8, proj_size=3),
    "gru": lambda: nn.GRU(9, 6),
    "gru without biases": lambda: nn.GRU(9, 6, bias=False),
    "rnn": lambda: nn.RNN(16, 8, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(7, 5),
    "gru cell": lambda: nn.GRUCell(64, 4),
}

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


class Model(nn.Module):
    """A recurrent module alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = MODULES[name]()

    def forward(self, x: Tensor) -> object:
        return self.rnn(x)

    def batch(self, seed: int = 0) -> Tensor:
        """Inputs off centre, as activations are."""
        generator = torch.Generator().manual_seed(seed)
        shape = (20,) if isinstance(self.rnn, nn.RNNCellBase) else (9, 4)
        return torch.randn(*shape, self.rnn.input_size, generator=generator) + 0.5

    def seen(self) -> dict[str, dict[str, DirectionStatistics]]:
        return collect(self, [(self.batch(seed),) for seed in range(2)])


def rebuilt(model: nn.Module, plans: list[PlannedLayer]) -> nn.Module:
    return replace_modules(model, {plan.name: plan.build() for plan in plans})


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for m in model.modules() if isinstance(m, HTRecurrent) for p in m.parameters())


def outputs(value: object) -> Tensor:
    parts = [value] if isinstance(value, Tensor) else list(value)
    return torch.cat([outputs(part).flatten() if not isinstance(part, Tensor) else part.flatten() for part in parts])


def smallest(model: nn.Module, budget: int, **options: object) -> int:
    """The budget that the error names."""
    with pytest.raises(UnreachableError) as caught:
        plan_model(inventory_of_model(model), Goal(budget=budget, **options))
    return int(re.search(r"budget of at least (\d+)", str(caught.value))[1])


# ---- budgets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("gru cell", Scope.AUTO),
        ("gru cell", Scope.SEPARATE),
        ("lstm with projection", Scope.AUTO),
        ("rnn", Scope.INPUT),
    ],
)
def test_the_smallest_budget_is_one_number(name: str, scope: Scope) -> None:
    """The same from every budget below it, it works, and one number less does not."""
    model = Model(name)
    least = smallest(model, 1, scope=scope)
    assert smallest(model, least - 1, scope=scope) == least
    compact = rebuilt(model, plan_model(inventory_of_model(model), Goal(budget=least, scope=scope)).layers)
    assert numbers(compact) <= least
    assert outputs(compact(model.batch())).isfinite().all()


def test_twice_the_budget_never_loses_more() -> None:
    """Measured by what is minimised: the squared errors of all matrices together, in their metrics."""
    model = Model("rnn")
    layers, seen, last = inventory_of_model(model), model.seen(), float("inf")
    for budget in (45, 90, 180):
        (plan,) = plan_model(layers, Goal(budget=budget, scope=Scope.SEPARATE), seen).layers
        error = sum(matrix.choice.error for direction in plan.directions.values() for matrix in direction.matrices)
        assert 0 < error < last
        last = error


# ---- what is stored -------------------------------------------------------------------------------------


def written_out(gates: GateMatrices, dense: DenseDirection) -> tuple[Tensor, Tensor]:
    """W_ih and W_hh of what is stored."""

    if gates.joint is not None:
        size, state = dense.ih.shape[1], dense.hh.shape[1]
        joint = gates.joint.dense()
        return joint[:, :size], joint[:, size : size + state]
    return gates.ih.dense(), gates.hh.dense()


def targets(
    model: Model, seen: dict[str, dict[str, DirectionStatistics]] | None, scope: Scope
) -> list[DirectionProblem]:
    (layer,) = inventory_of_model(model)
    return [
        DirectionProblem(
            direction, None if seen is None else seen["rnn"][name], direction.parameters * 2, scope, LayoutKind.SPLIT
        )
        for name, direction in layer.directions.items()
    ]


def chosen(target: DirectionProblem, recipe: Recipe, cut: int) -> GateMatrices:
    """Every matrix of the recipe in its last (most folded) form, at full ranks less a cut."""
    choices = []
    for part in recipe.parts:
        form = part.search.candidates[-1]
        left, right = form.layout.tree.root.children
        ranks = list(form.model.full)
        ranks[left] = ranks[right] = max(1, ranks[left] - cut)
        matrix = form.truncate(ranks)
        choices.append(Choice(matrix.parameters, 0.0, matrix))
    return target.matrices(recipe, choices)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("scope", [Scope.INTEGRATED, Scope.SEPARATE, Scope.INPUT])
@pytest.mark.parametrize("name", MODULES)
def test_full_ranks_are_exact_in_every_recipe(name: str, scope: Scope, weighted: bool) -> None:
    """Also with the mean error moved into the biases: there is none."""
    model = Model(name)
    built = targets(model, model.seen() if weighted else None, scope)
    for index in range(len(built[0].recipes)):
        gates = [chosen(target, target.recipes[index], 0) for target in built]
        settings = built[0].dense.settings
        drop_in = module_class(settings).from_matrices(settings, gates)
        compact = replace_modules(model, {"rnn": drop_in.float()})
        assert distance(outputs(compact(model.batch())), outputs(model(model.batch()))) < 2e-5


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "lstm cell", "gru cell"])
def test_the_biases_take_up_the_mean_error(name: str) -> None:
    """Over the calibration inputs, both products with their biases keep their means."""
    model = Model(name)
    seen = model.seen()
    for scope in (Scope.INTEGRATED, Scope.SEPARATE, Scope.INPUT):
        for target in targets(model, seen, scope):
            dense, recipe = target.dense, target.recipes[-1]
            gates = chosen(target, recipe, 2)
            ih, hh = written_out(gates, dense)
            mean = target.seen.inputs.double().mean(0)
            x, h = mean[: dense.ih.shape[1]], mean[dense.ih.shape[1] :]
            at_x, at_h = (dense.ih.double() - ih.double()) @ x, (dense.hh.double() - hh.double()) @ h
            change = (gates.bias - dense.bias).double()
            scale = float((at_x.abs() + at_h.abs()).max())
            assert scale > 1e-3
            if dense.bias_hn is None:
                assert float((change - at_x - at_h).abs().max()) < 1e-5
                continue
            keep = 2 * dense.settings.hidden_size
            assert float((change[:keep] - at_x[:keep] - at_h[:keep]).abs().max()) < 1e-5
            assert float((change[keep:] - at_x[keep:]).abs().max()) < 1e-5
            assert float((gates.bias_hn.double() - dense.bias_hn.double() - at_h[keep:]).abs().max()) < 1e-5


def test_without_data_the_biases_stay() -> None:
    model = Model("gru")
    for scope in (Scope.INTEGRATED, Scope.SEPARATE, Scope.INPUT):
        (target,) = targets(model, None, scope)
        gates = chosen(target, target.recipes[-1], 2)
        assert torch.equal(gates.bias, target.dense.bias)
        assert torch.equal(gates.bias_hn, target.dense.bias_hn)


def test_recipes_count_what_they_store() -> None:
    for name in ("lstm with projection", "gru", "gru without biases", "rnn"):
        model = Model(name)
        for scope in (Scope.INTEGRATED, Scope.SEPARATE, Scope.INPUT):
            for target in targets(model, None, scope):
                for recipe in target.recipes:
                    gates = chosen(target, recipe, 1)
                    stored = [m for m in vars(gates).values() if isinstance(m, torch.Tensor | StoredMatrix)]
                    count = sum(m.numel() if isinstance(m, torch.Tensor) else m.parameters for m in stored)
                    parts = sum(m.parameters for m in stored if isinstance(m, HTMatrix))
                    assert count == recipe.fixed + parts
                    assert recipe.scope is scope


def test_the_frontier_of_a_direction_is_one() -> None:
    (target,) = targets(Model("lstm"), Model("lstm").seen(), Scope.AUTO)
    (own,) = ladders([target])
    frontier = target.frontier(own)
    for a, b in pairwise(frontier):
        assert a.size < b.size
        assert a.error > b.error
    assert frontier[0].size == min(recipe.smallest for recipe in target.recipes)
    assert {option.recipe.scope for option in frontier} <= {Scope.INTEGRATED, Scope.SEPARATE}


# ---- odd directions ------------------------------------------------------------------------------------------


def test_a_direction_that_does_not_matter_is_planned() -> None:
    """The output sees one direction only: the other's gradients are zero or were never seen."""

    class Forwards(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0][..., :5]

    model = Forwards("lstm of two directions")
    layers, seen = inventory_of_model(model), model.seen()
    dense = sum(direction.parameters for direction in layers[0].directions.values())
    compact = rebuilt(model, plan_model(layers, Goal(budget=dense // 2), seen).layers)
    assert numbers(compact) <= dense // 2
    assert compact(model.batch()).isfinite().all()


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_weights_of_zero_are_planned(name: str) -> None:
    model = Model(name)
    for p in model.parameters():
        nn.init.zeros_(p)
    layers = inventory_of_model(model)
    for goal in (Goal(ratio=2), Goal(error=0.1)):
        compact = rebuilt(model, plan_model(layers, goal).layers)
        assert torch.equal(outputs(compact(model.batch())), outputs(model(model.batch())))


def test_the_dtype_of_the_checkpoint_is_kept() -> None:
    model = Model("rnn").double()
    plans = plan_model(inventory_of_model(model), Goal(ratio=2)).layers
    assert {p.dtype for p in plans[0].build().parameters()} == {torch.float64}


def test_the_weights_of_the_model_stay() -> None:
    model = Model("rnn")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    plan_model(inventory_of_model(model), Goal(ratio=2), model.seen())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_allocation_of_very_many_points_stays_within_the_budget() -> None:
    """Where the merged frontier is thinned out: nothing is exceeded, and little lost against the bound."""
    generator = torch.Generator().manual_seed(0)
    frontiers = []
    for _ in range(6):
        counts = torch.randperm(5000, generator=generator)[:60].sort().values + 1
        errors = torch.rand(60, generator=generator).sort(descending=True).values
        recipe = Recipe(Scope.SEPARATE, (), 0)
        frontiers.append([Option(int(p), float(e), recipe, ()) for p, e in zip(counts, errors, strict=True)])
    last = float("inf")
    for budget in (2000, 4000, 8000, 16000, 40000):
        found = allocate(frontiers, budget)
        assert sum(o.size for o in found) <= budget
        error = sum(o.error for o in found)
        assert error <= last
        # Lagrange: no combination within the budget is better than this, for any price.
        prices = torch.logspace(-7, -1, 200).tolist()
        bound = max(sum(min(o.error + p * o.size for o in f) for f in frontiers) - p * budget for p in prices)
        assert error >= bound - 1e-9
        assert error <= 1.1 * bound + 0.01
        last = error


def test_a_metric_of_data_weighs_a_direction_as_a_whole() -> None:
    """Twenty times the gradients: that direction is given the numbers."""
    model = Model("lstm of two directions")
    seen = model.seen()
    directions = seen["rnn"]
    for direction in directions.values():
        direction.gradients_ih = direction.gradients_hh = observed(20, 4, seed=1).gradients.double()
    directions["l0_reverse"].gradients_ih = directions["l0_reverse"].gradients_hh = 400 * directions["l0"].gradients_ih
    (layer,) = inventory_of_model(model)
    (plan,) = plan_model([layer], Goal(ratio=3), seen).layers
    forth, back = (sum(m.choice.parameters for m in plan.directions[name].matrices) for name in ("l0", "l0_reverse"))
    assert back > 2 * forth

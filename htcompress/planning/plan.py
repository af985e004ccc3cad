"""One goal over all matrices of a model: which form each gets, and what that loses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from htcompress.errors import UnreachableError
from htcompress.forms.form import Choice
from htcompress.matrix.weighted import relative
from htcompress.model.statistics import DirectionStatistics
from htcompress.nn.dense import DenseLayer
from htcompress.nn.gates import GateMatrices
from htcompress.nn.order import order_words
from htcompress.nn.recurrent import HTRecurrent, module_class
from htcompress.nn.settings import RecurrentSettings
from htcompress.planning.direction import DirectionProblem, Ladders, Option, Part, Recipe
from htcompress.request import Goal
from htcompress.vocabulary import WIDEST, Scope

_MERGED = 4000
"""Points of a merged frontier up to which the allocation is exact; a few dozen points a matrix stay far below."""
_SHOWN = 64  # singular values of a matrix
_CURVE = 40  # points of a frontier
_ORDERS = 0.1
"""The part of a budget that the orders of hidden units may take."""


@dataclass(frozen=True, eq=False)
class PlannedMatrix:
    """One matrix of the plan; errors are relative; `output_error` is None without statistics."""

    name: str
    choice: Choice
    shape: tuple[int, int]
    weight_error: float
    output_error: float | None
    spectrum: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class PlannedDirection:
    """One layer and direction of the plan; `scope` is None where it stays dense."""

    scope: Scope | None
    gates: GateMatrices
    matrices: tuple[PlannedMatrix, ...]


@dataclass(frozen=True, eq=False)
class PlannedLayer:
    """One recurrent layer of the plan."""

    name: str
    settings: RecurrentSettings
    directions: dict[str, PlannedDirection]
    dtype: torch.dtype
    bits: int = WIDEST

    def build(self) -> HTRecurrent:
        """The module that the plan describes, in its layer's dtype, on the CPU."""
        matrices = [direction.gates for direction in self.directions.values()]
        module = module_class(self.settings).from_matrices(self.settings, matrices).to(self.dtype)
        module.store_in(self.bits)
        return module


@dataclass(frozen=True, eq=False)
class Plan:
    """All layers, and the frontier: numbers and the relative error expected there, up to the budget."""

    layers: list[PlannedLayer]
    frontier: tuple[tuple[int, float], ...]


def plan_model(
    layers: Sequence[DenseLayer],
    goal: Goal,
    statistics: Mapping[str, Mapping[str, DirectionStatistics]] | None = None,
    orders: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Plan:
    """Plan the compression of recurrent layers.

    With a budget (or a ratio) one allocation covers all matrices: the combination of least total squared
    error, in the metric of the statistics, that stores no more. With an error every matrix takes the fewest
    numbers that keep it.

    Args:
        orders: of the hidden units, by layer and direction, for the matrices to be folded in; they are used where
            storing them takes no more than `_ORDERS` of the budget, and stored where something is folded.

    Raises:
        UnreachableError: the budget is smaller than what the most compact combination stores.
    """
    before = sum(layer.settings.dense_parameters for layer in layers)
    budget = goal.budget_for(before)
    cap = budget if budget is not None else before
    found = orders or {}
    words = sum(order_words(len(order)) for directions in found.values() for order in directions.values())
    if budget is None or words > _ORDERS * budget:
        found = {}
    targets = [
        DirectionProblem(
            direction,
            (statistics or {}).get(layer.name, {}).get(name),
            cap,
            goal.scope,
            goal.layout,
            goal.format,
            found.get(layer.name, {}).get(name),
            goal.bits,
        )
        for layer in layers
        for name, direction in layer.directions.items()
    ]
    frontier: tuple[tuple[int, float], ...] = ()
    if budget is None:
        chosen = [_within_error(target, goal.error or 0.0) for target in targets]
    else:
        asked = f"budget of {budget}" if goal.ratio is None else f"ratio of {goal.ratio:g}, {budget}"
        chosen, ladders = _within_budget(targets, budget, asked)
        frontier = _frontier(targets, ladders, budget)
    plans, index = [], 0
    for layer in layers:
        directions = {}
        for name in layer.directions:
            recipe, choices = chosen[index]
            directions[name] = _direction_plan(targets[index], recipe, choices)
            index += 1
        plans.append(PlannedLayer(layer.name, layer.settings, directions, layer.dtype, goal.bits))
    return Plan(plans, frontier)


Chosen = tuple[Recipe, tuple[Choice, ...]]


def _within_error(target: DirectionProblem, rtol: float) -> Chosen:
    """The recipe of fewest numbers whose every matrix keeps the relative weight error."""
    found: list[tuple[int, Chosen]] = []
    for recipe in target.recipes:
        choices = tuple(part.search.cheapest(rtol) for part in recipe.parts)
        if recipe.scope is Scope.INTEGRATED and choices[0].is_dense:
            continue  # a dense joint matrix is the dense layer: the separate recipe says so
        found.append((recipe.parameters(choices), (recipe, choices)))
    dense = _dense(target)
    found.append((target.dense.parameters, dense))
    return min(found, key=lambda item: item[0])[1]


def _dense(target: DirectionProblem) -> Chosen:
    """The direction as it is; its recipe says which matrices would have been compressed."""
    recipe = target.recipes[-1]
    return recipe, tuple(part.search.dense for part in recipe.parts)


def _within_budget(targets: Sequence[DirectionProblem], budget: int, asked: str) -> tuple[list[Chosen], list[Ladders]]:
    least = sum(min(recipe.smallest for recipe in target.recipes) for target in targets)
    if least > budget:
        raise UnreachableError(
            f"The {asked} parameters cannot be reached: the most compact form of these "
            f"{len(targets)} layer(s) and direction(s) stores {least}. Ask for a budget of at least {least}, or "
            f"widen --scope or --layout if you narrowed them.",
            least=least,
        )
    ladders = [target.ladders() for target in targets]
    while True:
        options = allocate([_with_dense(*pair) for pair in zip(targets, ladders, strict=True)], budget)
        if options is None:
            raise RuntimeError(f"No combination of forms stores {budget} numbers, though the smallest stores {least}.")
        # What is chosen by an expected error is refined, then its neighbours, and chosen again by what that came to.
        taken = [
            (own, part, choice)
            for own, option in zip(ladders, options, strict=True)
            for part, choice in zip(option.recipe.parts, option.choices, strict=True)
        ]
        if not _improved([(own, part, [choice]) for own, part, choice in taken]) and not _improved(
            [(own, part, own[part].neighbours(choice)) for own, part, choice in taken]
        ):
            break
    chosen = _spend([(option.recipe, option.choices) for option in options], budget)
    total = sum(_parameters(c) for c in chosen)
    if total > budget:
        raise RuntimeError(f"The forms that were chosen store {total} numbers, more than the budget of {budget}.")
    return chosen, ladders


def _improved(asked: Iterable[tuple[Ladders, Part, Sequence[Choice]]]) -> bool:
    """Put ladders in place in which the choices asked for are refined; whether any was left to refine."""
    better = False
    for ladders, part, choices in asked:
        for choice in choices:
            ladder = ladders[part].improved(choice)
            if ladder is not None:
                ladders[part], better = ladder, True
    return better


def _with_dense(target: DirectionProblem, ladders: Ladders) -> list[Option]:
    recipe, choices = _dense(target)
    dense = Option(target.dense.parameters, 0.0, recipe, choices)
    return [o for o in target.frontier(ladders) if o.parameters < dense.parameters] + [dense]


def _parameters(chosen: Chosen) -> int:
    recipe, choices = chosen
    return recipe.parameters(choices)


def _frontier(
    targets: Sequence[DirectionProblem], ladders: Sequence[Ladders], budget: int
) -> tuple[tuple[int, float], ...]:
    """The expected error for every budget up to this one, relative to that of zero matrices."""
    merged = merge([_with_dense(*pair) for pair in zip(targets, ladders, strict=True)], budget)
    total = sum(part.weight * part.search.target.total for target in targets for part in target.recipes[-1].parts)
    step = -(-len(merged) // _CURVE)
    kept = [*merged[::step], *merged[-1:]] if merged else []
    return tuple(dict.fromkeys((numbers, float(f"{relative(error, total):.4g}")) for numbers, error, _ in kept))


def allocate(frontiers: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """One option from each frontier, of least total error within the budget; None where nothing fits."""
    merged = merge(frontiers, budget)
    return list(merged[-1][2]) if merged else None


def merge(frontiers: Sequence[Sequence[Option]], budget: int) -> list[tuple[int, float, tuple[Option, ...]]]:
    """The combinations of one option from each frontier that no other beats, within the budget.

    A multiple-choice knapsack, solved by merging the frontiers one after the other and keeping what no
    other combination beats; exact as long as a merged frontier holds no more than a few thousand points.
    """
    merged: list[tuple[int, float, tuple[Option, ...]]] = [(0, 0.0, ())]
    for frontier in frontiers:
        points = [
            (p + o.parameters, e + o.error, (*taken, o))
            for p, e, taken in merged
            for o in frontier
            if p + o.parameters <= budget
        ]
        points.sort(key=lambda point: (point[0], point[1]))
        kept: list[tuple[int, float, tuple[Option, ...]]] = []
        for point in points:
            if not kept or point[1] < kept[-1][1]:
                kept.append(point)
        # Too many to go on with: keep an even spread and both ends.
        step = -(-len(kept) // _MERGED) if kept else 1
        merged = kept[::step] + ([kept[-1]] if step > 1 else [])
    return merged


def _spend(chosen: list[Chosen], budget: int) -> list[Chosen]:
    """Give what the frontiers' coarse steps left over to the matrices, in the order of their errors."""
    chosen = [
        (recipe, tuple(part.search.exact(choice) for part, choice in zip(recipe.parts, choices, strict=True)))
        for recipe, choices in chosen
    ]
    spread = [
        (index, k, part.weight * choices[k].error)
        for index, (recipe, choices) in enumerate(chosen)
        for k, part in enumerate(recipe.parts)
        if not choices[k].is_dense
    ]
    shares = sum(chosen[i][1][k].parameters for i, k, _ in spread)
    for last, (index, k, _) in enumerate(sorted(spread, key=lambda item: item[2])):
        left = budget - sum(_parameters(c) for c in chosen)
        recipe, choices = chosen[index]
        own = choices[k].parameters
        room = left if last == len(spread) - 1 else int(left * own / max(1, shares))
        shares -= own
        better = recipe.parts[k].search.best(own + room, polish=True)
        if better is not None and better.error < choices[k].error and better.matrix is not None:
            chosen[index] = recipe, (*choices[:k], better, *choices[k + 1 :])
    return chosen


def _direction_plan(target: DirectionProblem, recipe: Recipe, choices: tuple[Choice, ...]) -> PlannedDirection:
    matrices = []
    choices = tuple(_balanced(choice) for choice in choices)
    for part, choice in zip(recipe.parts, choices, strict=True):
        wanted, plain = part.search.target, part.search.target.metric.is_plain
        matrices.append(
            PlannedMatrix(
                part.name,
                choice,
                wanted.matrix.shape,
                0.0 if choice.matrix is None else wanted.weight_error_of(choice.matrix),
                None if plain else relative(choice.error, wanted.total),
                None if choice.matrix is None else _spectrum(part.search.spectrum),
            )
        )
    scope = None if all(choice.is_dense for choice in choices) else recipe.scope
    return PlannedDirection(scope, target.matrices(recipe, choices), tuple(matrices))


def _spectrum(values: Tensor | None) -> tuple[float, ...] | None:
    if values is None or not len(values) or float(values[0]) <= 0:
        return None
    return tuple((values[:_SHOWN] / values[0]).tolist())


def _balanced(choice: Choice) -> Choice:
    return choice if choice.matrix is None else replace(choice, matrix=choice.matrix.balance())

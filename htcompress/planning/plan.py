"""One goal over all matrices of a model: which form each gets, and what that loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from htcompress.errors import UnreachableError
from htcompress.forms.coded import coded, through
from htcompress.forms.core_problem import Feedback
from htcompress.forms.form import Choice, Search
from htcompress.matrix.weighted import relative
from htcompress.memory import give_back
from htcompress.model.statistics import DirectionStatistics
from htcompress.nn.dense import DenseLayer
from htcompress.nn.gates import GateMatrices
from htcompress.nn.order import order_words, words_of
from htcompress.nn.recurrent import HTRecurrent, module_class
from htcompress.nn.settings import RecurrentSettings
from htcompress.planning.direction import DirectionProblem, Ladders, Option, Recipe
from htcompress.planning.exponents import exponents_of
from htcompress.planning.knapsack import combined
from htcompress.planning.together import Chosen, as_it_is, frontiers, improved
from htcompress.planning.together import ladders as ladders_of
from htcompress.planning.together import least as least_of
from htcompress.planning.unit import Unit
from htcompress.request import Goal
from htcompress.side_by_side import side_by_side
from htcompress.storage import codec_within
from htcompress.vocabulary import BITS, WIDEST, Scope

_SHOWN = 64  # singular values of a matrix
_CURVE = 40  # points of a frontier
_BESIDE = 0.1
"""The part of a budget that the orders of hidden units may take, and the exponents of inputs as well."""


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
    """In which numbers are stored at most whose codecs the plan does not tell."""

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
        orders: of the hidden units, by layer and direction, for the matrices to be folded in; they are stored where
            something is folded. Whether a budget has room for them, `has_room_for` tells.

    Raises:
        UnreachableError: the budget is smaller than what the most compact combination stores.
    """
    unit, budget = _unit_and_budget(layers, goal)
    cap = budget if budget is not None else _numbers(layers)
    known, found = statistics or {}, orders or {}
    exponents = exponents_of(layers, known)
    if not _fits(sum(words_of(len(own)) for own in exponents.values()), unit, budget):
        exponents = {}

    def problems(beside: bool) -> list[DirectionProblem]:
        return [
            DirectionProblem(
                direction,
                known.get(layer.name, {}).get(name),
                cap,
                goal.scope,
                goal.layout,
                goal.format,
                found.get(layer.name, {}).get(name) if beside else None,
                unit,
                exponents.get((layer.name, name)) if beside else None,
                sum(len(layer.directions) for layer in layers),
            )
            for layer in layers
            for name, direction in layer.directions.items()
        ]

    targets = problems(True)
    least = 0 if budget is None else least_of(targets)
    if budget is not None and (found or exponents) and least > budget:
        # What is stored beside the matrices is no reason to refuse.
        targets = problems(False)
        least = least_of(targets)
    frontier: tuple[tuple[int, float], ...] = ()
    if budget is None:
        chosen = [_within_error(target, goal.error or 0.0) for target in targets]
    else:
        asked = f"budget of {budget}" if goal.ratio is None else f"ratio of {goal.ratio:g}, {budget}"
        asked += " parameters" if goal.bytes is None else " bytes"
        chosen, ladders = _within_budget(targets, budget, least, asked)
        frontier = _frontier(targets, ladders, budget) if ladders else ()
        if exponents and unit.width is not None:
            # Nor is what is stored beside the matrices a reason to be worse than rounding all without it.
            bare = problems(False)
            rounded = _rounded_alike(bare, budget)
            if rounded is not None and _error(rounded) < _error(chosen):
                targets, chosen = bare, rounded
    plans, index = [], 0
    for layer in layers:
        directions = {}
        for name in layer.directions:
            recipe, choices = chosen[index]
            directions[name] = _direction_plan(targets[index], recipe, choices)
            index += 1
        plans.append(
            PlannedLayer(
                layer.name, layer.settings, directions, layer.dtype, WIDEST if goal.bytes is not None else goal.width
            )
        )
    return Plan(plans, frontier)


def has_room_for(orders: Mapping[str, Mapping[str, Tensor]], layers: Sequence[DenseLayer], goal: Goal) -> bool:
    """Whether orders of hidden units take no more than their part of a goal's budget; not where it has none."""
    unit, budget = _unit_and_budget(layers, goal)
    words = sum(order_words(len(order)) for directions in orders.values() for order in directions.values())
    return _fits(words, unit, budget)


def _fits(words: int, unit: Unit, budget: int | None) -> bool:
    return budget is not None and unit.of_words(words) <= _BESIDE * budget


def _unit_and_budget(layers: Sequence[DenseLayer], goal: Goal) -> tuple[Unit, int | None]:
    """What a goal counts in, and how much of it there may be."""
    if goal.bytes is None:
        return Unit((goal.width,)), goal.budget_for(_numbers(layers))
    width = max((layer.dtype.itemsize for layer in layers), default=4)
    return Unit(_bits_of(goal), width), goal.bytes


def _numbers(layers: Sequence[DenseLayer]) -> int:
    return sum(layer.settings.dense_parameters for layer in layers)


def _within_error(target: DirectionProblem, rtol: float) -> Chosen:
    """The recipe of fewest numbers whose every matrix keeps the relative weight error."""
    found: list[tuple[int, Chosen]] = []
    for recipe in target.recipes:
        choices = tuple(part.search.cheapest(rtol) for part in recipe.parts)
        if recipe.scope is Scope.INTEGRATED and choices[0].is_dense:
            continue  # a dense joint matrix is the dense layer: the separate recipe says so
        found.append((recipe.size(choices), (recipe, choices)))
    dense = as_it_is(target)
    found.append((target.dense_size, dense))
    return min(found, key=lambda item: item[0])[1]


def _within_budget(
    targets: Sequence[DirectionProblem], budget: int, least: int, asked: str
) -> tuple[list[Chosen], list[Ladders]]:
    if least > budget:
        raise UnreachableError(
            f"The {asked} cannot be reached: the most compact form of these {len(targets)} layer(s) and direction(s) "
            f"stores {least}. Ask for a budget of at least {targets[0].unit.asked(least)}, or widen --scope, --layout, "
            f"--format or --bits if you narrowed them.",
            least=least,
        )
    if targets[0].unit.width is not None and sum(target.dense_size for target in targets) <= budget:
        return [as_it_is(target) for target in targets], []
    ladders = ladders_of(targets)
    while True:
        options = allocate(frontiers(targets, ladders), budget)
        if options is None:
            raise RuntimeError(f"No combination of forms stores {budget} numbers, though the smallest stores {least}.")
        # What is chosen by an expected error is refined, then its neighbours, and chosen again by what that came to.
        taken = [
            (own, list(zip(option.recipe.parts, option.choices, strict=True)))
            for own, option in zip(ladders, options, strict=True)
        ]
        if not improved([(own, [(part, [choice]) for part, choice in parts]) for own, parts in taken]) and not improved(
            [(own, [(part, own[part].neighbours(choice)) for part, choice in parts]) for own, parts in taken]
        ):
            break
    give_back()
    chosen = _spend([(option.recipe, option.choices) for option in options], budget)
    chosen = _each(chosen, lambda search, choice: search.polished(choice))
    rounded = _rounded_alike(targets, budget)
    if rounded is not None and _error(rounded) < _error(chosen):
        chosen = rounded
    total = sum(_size(c) for c in chosen)
    if total > budget:
        raise RuntimeError(f"The forms that were chosen store {total} numbers, more than the budget of {budget}.")
    return chosen, ladders


def _size(chosen: Chosen) -> int:
    recipe, choices = chosen
    return recipe.size(choices)


def _error(chosen: Sequence[Chosen]) -> float:
    return sum(
        part.weight * choice.error
        for recipe, choices in chosen
        for part, choice in zip(recipe.parts, choices, strict=True)
    )


def _rounded_alike(targets: Sequence[DirectionProblem], budget: int) -> list[Chosen] | None:
    """All dense matrices in equally many bits, as many as a budget of bytes allows; None where none do.

    What is chosen by expected errors is held against it: nothing is worse than rounding all at equal bytes.
    """
    recipes = [target.recipes[-1] for target in targets]
    for bits in targets[0].unit.bits:
        alike = [(recipe, [part.search.rounded(bits) for part in recipe.parts]) for recipe in recipes]
        whole = [(recipe, tuple(c for c in choices if c is not None)) for recipe, choices in alike]
        if any(len(choices) < len(recipe.parts) for recipe, choices in whole):
            return None
        if sum(map(_size, whole)) <= budget:
            return _each(whole, lambda search, choice: search.exact(choice))
    return None


def _each(chosen: Sequence[Chosen], work: Callable[[Search, Choice], Choice]) -> list[Chosen]:
    """The same, with something done to each choice."""
    pairs = [pair for recipe, choices in chosen for pair in zip(recipe.parts, choices, strict=True)]
    done = iter(side_by_side(lambda pair: work(pair[0].search, pair[1]), pairs))
    return [(recipe, tuple(islice(done, len(choices)))) for recipe, choices in chosen]


def _frontier(
    targets: Sequence[DirectionProblem], ladders: Sequence[Ladders], budget: int
) -> tuple[tuple[int, float], ...]:
    """The expected error for every budget up to this one, relative to that of zero matrices."""
    found = combined(frontiers(targets, ladders), budget)
    total = sum(part.weight * part.search.target.total for target in targets for part in target.recipes[-1].parts)
    points = list(zip(found.sizes.tolist(), found.errors.tolist(), strict=True))
    kept = [*points[:: -(-len(points) // _CURVE)], *points[-1:]] if points else []
    return tuple(dict.fromkeys((numbers, float(f"{relative(error, total):.4g}")) for numbers, error in kept))


def allocate(frontiers: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """One option from each frontier, of least total error within the budget; None where nothing fits."""
    found = combined(frontiers, budget)
    if not len(found):
        return None
    return [frontier[at] for frontier, at in zip(frontiers, found.items[:, -1], strict=True)]


def _spend(chosen: list[Chosen], budget: int) -> list[Chosen]:
    """Give what the frontiers' coarse steps left over to the matrices, in the order of their errors."""
    chosen = _each(chosen, lambda search, choice: search.exact(choice))
    spread = [
        (index, k, part.weight * choices[k].error)
        for index, (recipe, choices) in enumerate(chosen)
        for k, part in enumerate(recipe.parts)
        if not choices[k].is_dense
    ]
    shares = sum(chosen[i][1][k].size for i, k, _ in spread)
    for last, (index, k, _) in enumerate(sorted(spread, key=lambda item: item[2])):
        left = budget - sum(_size(c) for c in chosen)
        recipe, choices = chosen[index]
        own = choices[k].size
        room = left if last == len(spread) - 1 else int(left * own / max(1, shares))
        shares -= own
        better = recipe.parts[k].search.grown(choices[k], own + room)
        recipe.parts[k].search.let_go()
        if better is not None and better.error < choices[k].error and better.matrix is not None:
            chosen[index] = recipe, (*choices[:k], better, *choices[k + 1 :])
    return chosen


def _direction_plan(target: DirectionProblem, recipe: Recipe, choices: tuple[Choice, ...]) -> PlannedDirection:
    matrices = []
    choices = tuple(
        _ready(part.search, choice, target.unit) for part, choice in zip(recipe.parts, choices, strict=True)
    )
    for part, choice in zip(recipe.parts, choices, strict=True):
        wanted, plain = part.search.target, part.search.target.metric.is_plain
        matrices.append(
            PlannedMatrix(
                part.name,
                choice,
                wanted.matrix.shape,
                target.weight_error(part, choice),
                None if plain else relative(choice.error, wanted.total),
                None if choice.matrix is None or choice.matrix.is_dense else _spectrum(part.search.spectrum),
            )
        )
    scope = None if all(choice.is_dense for choice in choices) else recipe.scope
    return PlannedDirection(scope, target.matrices(recipe, choices), tuple(matrices))


def _spectrum(values: Tensor | None) -> tuple[float, ...] | None:
    if values is None or not len(values) or float(values[0]) <= 0:
        return None
    return tuple((values[:_SHOWN] / values[0]).tolist())


def _ready(search: Search, choice: Choice, unit: Unit) -> Choice:
    """A choice as it will be stored and trained."""
    if unit.codes:
        return coded(choice, Feedback(search.target), unit.bits[0])
    if choice.matrix is None or choice.codecs:
        return choice
    # Rounded now, and not when it is stored: the biases take up what that does to the mean.
    codec = codec_within(unit.bits[0] if unit.width is None else WIDEST, torch.float32)
    return replace(choice, matrix=through(choice.matrix.balance(), codec)[0])


def _bits_of(goal: Goal) -> tuple[int, ...]:
    """What may be chosen from where bytes count."""
    return BITS[1:] if goal.bits is None else (goal.bits,)

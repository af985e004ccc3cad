"""What is asked of all directions at once: of each part by itself, beside each other where threads stand idle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from htcompress.forms.form import Choice
from htcompress.memory import give_back
from htcompress.planning.direction import DirectionProblem, Ladders, Option, Part, Recipe
from htcompress.side_by_side import side_by_side

Chosen = tuple[Recipe, tuple[Choice, ...]]

Asked = tuple[Ladders, Sequence[tuple[Part, Sequence[Choice]]]]
"""Of a direction: its ladders, and the choices of its parts that are to be refined."""


def as_it_is(target: DirectionProblem) -> Chosen:
    """A direction dense; its recipe says which matrices would have been compressed."""
    recipe = target.recipes[-1]
    return recipe, tuple(part.search.dense for part in recipe.parts)


def least(targets: Sequence[DirectionProblem]) -> int:
    """What the most compact combination stores."""
    side_by_side(_smallest, _in_turns(targets))
    return sum(min(recipe.smallest for recipe in target.recipes) for target in targets)


def _in_turns(targets: Sequence[DirectionProblem]) -> list[Part]:
    """The first part of every direction, then the second, and so on: what later ones take over from it is found."""
    # What all parts of a direction are made of is found by itself.
    side_by_side(lambda target: target.recipes, targets)
    turns = zip_longest(*(target.parts for target in targets))
    return [part for turn in turns for part in turn if part is not None]


def _smallest(part: Part) -> None:
    """Find the least size of a part; its search lets go of what is large before another is asked."""
    _ = part.search.smallest
    part.search.let_go()
    give_back()


def ladders(targets: Sequence[DirectionProblem]) -> list[Ladders]:
    """The ladders of every direction, before anything is refined."""
    parts = _in_turns(targets)
    found = dict(zip(parts, side_by_side(lambda part: part.search.ladder(), parts), strict=True))
    return [{part: found[part] for part in target.parts} for target in targets]


def improved(asked: Sequence[Asked]) -> bool:
    """Put ladders in place in which the choices asked for are refined; whether any was left to refine."""
    return any(side_by_side(_improve, [(own, part, choices) for own, parts in asked for part, choices in parts]))


def _improve(asked: tuple[Ladders, Part, Sequence[Choice]]) -> bool:
    own, part, choices = asked
    better = False
    for choice in choices:
        ladder = own[part].improved(choice)
        if ladder is not None:
            own[part], better = ladder, True
        part.search.let_go()
    return better


def frontiers(targets: Sequence[DirectionProblem], own: Sequence[Ladders]) -> list[list[Option]]:
    """What every direction may become, of growing size, and last what it is."""
    return side_by_side(lambda pair: _with_dense(*pair), list(zip(targets, own, strict=True)))


def _with_dense(target: DirectionProblem, own: Ladders) -> list[Option]:
    recipe, choices = as_it_is(target)
    dense = Option(target.dense_size, 0.0, recipe, choices)
    return [o for o in target.frontier(own) if o.size < dense.size] + [dense]

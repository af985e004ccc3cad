"""What is asked of all directions at once: of each by itself, beside each other where threads stand idle."""

from __future__ import annotations

from collections.abc import Sequence

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
    return sum(side_by_side(lambda target: min(map(_smallest, target.recipes)), targets))


def _smallest(recipe: Recipe) -> int:
    """The least size of a recipe; its searches let go of what is large before another's are asked."""
    for part in recipe.parts:
        _ = part.search.smallest
        part.search.let_go()
        give_back()
    return recipe.smallest


def ladders(targets: Sequence[DirectionProblem]) -> list[Ladders]:
    """The ladders of every direction, before anything is refined."""
    return side_by_side(lambda target: target.ladders(), targets)


def improved(asked: Sequence[Asked]) -> bool:
    """Put ladders in place in which the choices asked for are refined; whether any was left to refine."""
    return any(side_by_side(_improve, asked))


def _improve(asked: Asked) -> bool:
    own, parts = asked
    better = False
    for part, choices in parts:
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

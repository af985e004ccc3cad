"""The choices of a search for HT forms, a few of them refined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log

from htcompress.forms.form import Choice, Ladder, front
from htcompress.side_by_side import cached_property


@dataclass(frozen=True, eq=False)
class HTLadder(Ladder):
    """The choices of an `HTSearch` for a rising series of budgets, some of them refined.

    What refinement will gain differs from matrix to matrix: the errors of choices that were not refined are what they
    would come to at the gain of the nearest one that was.

    Attributes:
        glanced: refines a choice a little; None where that would gain nothing.
        rungs: as they were decomposed, by ascending numbers.
        beside: truncated SVDs that are their rivals once all are rounded.
        dense: the matrix as it is.
        refined: some of the rungs refined, by their place.
    """

    glanced: Callable[[Choice], Choice] | None
    rungs: tuple[Choice, ...]
    beside: tuple[Choice, ...]
    dense: Choice
    refined: Mapping[int, Choice] = field(default_factory=dict)

    @cached_property
    def choices(self) -> Sequence[Choice]:
        """A Pareto front by ascending numbers, the dense matrix at its end."""
        return front([*(self._expected(at, self.refined) for at in range(len(self.rungs))), self.dense])

    @cached_property
    def every(self) -> Sequence[Choice]:
        """Folded choices and truncated SVDs by ascending numbers; the latter are where they are best."""
        gains = {at: choice for at, choice in self.refined.items() if choice.folds}
        rungs = [self._expected(at, gains) if rung.folds else rung for at, rung in enumerate(self.rungs)]
        return [*sorted([*rungs, *self.beside], key=lambda choice: choice.parameters), self.dense]

    def improved(self, choice: Choice) -> HTLadder | None:
        """The ladder with a choice refined; None where it has been, or that would gain nothing."""
        at = next((k for k, rung in enumerate(self.rungs) if rung.matrix is choice.matrix), None)
        if self.glanced is None or at is None or at in self.refined:
            return None
        return replace(self, refined={**self.refined, at: self.glanced(self.rungs[at])})

    def neighbours(self, choice: Choice) -> Sequence[Choice]:
        """The choices next to one of them."""
        at = next((k for k, rung in enumerate(self.choices) if rung.matrix is choice.matrix), None)
        return [] if at is None else [*self.choices[max(0, at - 1) : at], *self.choices[at + 1 : at + 2]]

    def _expected(self, at: int, refined: Mapping[int, Choice]) -> Choice:
        raw = self.rungs[at]
        if at in refined or not refined:
            return refined.get(at, raw)
        nearest = min(refined, key=lambda k: abs(log(self.rungs[k].parameters / raw.parameters)))
        before, after = self.rungs[nearest].error, refined[nearest].error
        return replace(raw, error=raw.error * (after / before if before > 0 else 1.0))

"""The choices of a search for HT forms, a few of them refined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log

from htcompress.forms.form import Choice, Ladder, front


def folded(choice: Choice) -> bool:
    """Whether a choice has cores that refinement may gain something at: not the dense matrix, nor a truncated SVD."""
    return choice.matrix is not None and choice.matrix.folds


@dataclass(frozen=True, eq=False)
class HTLadder(Ladder):
    """The choices of an `HTSearch` for a rising series of budgets, some of them refined.

    What refinement will gain differs from matrix to matrix: the errors of folded choices that were not refined are what
    they would come to at the gain of the nearest one that was. A truncated SVD is where it is best.

    Attributes:
        glanced: refines a choice a little; None where that would gain nothing.
        rungs: as they were decomposed, by ascending numbers.
        dense: the matrix as it is.
        refined: some of them refined, by their place among the rungs.
    """

    glanced: Callable[[Choice], Choice] | None
    rungs: tuple[Choice, ...]
    dense: Choice
    refined: Mapping[int, Choice] = field(default_factory=dict)

    @cached_property
    def choices(self) -> Sequence[Choice]:
        """A Pareto front by ascending numbers, the dense matrix at its end."""
        return front(self.every)

    @cached_property
    def every(self) -> Sequence[Choice]:
        """All of them by ascending numbers, truncated SVDs beside what is folded."""
        return [*map(self._expected, range(len(self.rungs))), self.dense]

    def improved(self, choice: Choice) -> HTLadder | None:
        """The ladder with a choice refined; None where it has been, or that would gain nothing."""
        at = next((k for k, rung in enumerate(self.rungs) if rung.matrix is choice.matrix), None)
        if self.glanced is None or at is None or at in self.refined or not folded(choice):
            return None
        return replace(self, refined={**self.refined, at: self.glanced(self.rungs[at])})

    def neighbours(self, choice: Choice) -> Sequence[Choice]:
        """The choices next to one of them."""
        at = next((k for k, rung in enumerate(self.choices) if rung.matrix is choice.matrix), None)
        return [] if at is None else [*self.choices[max(0, at - 1) : at], *self.choices[at + 1 : at + 2]]

    def _expected(self, at: int) -> Choice:
        raw = self.rungs[at]
        if at in self.refined or not self.refined or not folded(raw):
            return self.refined.get(at, raw)
        nearest = min(self.refined, key=lambda k: abs(log(self.rungs[k].parameters / raw.parameters)))
        before, after = self.rungs[nearest].error, self.refined[nearest].error
        return replace(raw, error=raw.error * (after / before if before > 0 else 1.0))

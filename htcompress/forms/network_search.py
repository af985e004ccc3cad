"""The search among structures of one comparison format: the counterpart of `htcompress.forms.ht_search.HTSearch`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from math import prod

import torch
from torch import Tensor

from htcompress.forms.form import Choice, Ladder, MatrixSearch, Problem, front
from htcompress.forms.network_matrix import NetworkMatrix
from htcompress.forms.reduced import Reduced
from htcompress.forms.refine import ITERATIONS, refine_cores
from htcompress.forms.structure import Structure
from htcompress.matrix.folding import col_foldings, finer, row_foldings
from htcompress.matrix.layout import Layout
from htcompress.matrix.whitening import Whitening
from htcompress.side_by_side import cached_property

_EACH = 2  # foldings of one side looked at for each order
_KEPT = 2  # layouts that are decomposed at every budget
_LADDER_RATIO = 2.0  # from one budget of the ladder to the next; each costs a decomposition
_LARGE = 1 << 23  # numbers from which writing a matrix out is what refinement costs
_LARGE_ITERATIONS = 12  # of refinement, where every one writes out a large matrix
_CLOSER = 1.3  # from one budget to the next in search of an error


class NetworkSearch(MatrixSearch):
    """The structures of one format for one matrix, and the best of them for any budget.

    Foldings pair row and column modes, as the formats' papers do. A few are compared at the largest budget, the best
    go on; cores come from the whitened matrix, and are refined in the exact metric as those of HT are.

    Args:
        kind: the structures: tensor trains, tensor rings or block terms.
    """

    def __init__(self, problem: Problem, kind: type[Structure]) -> None:
        super().__init__(problem)
        self.kind = kind
        self._known: dict[Structure, Choice] = {}

    @property
    def spectrum(self) -> Tensor | None:
        """The singular values in the metric; None where the rows are too many."""
        gram = self.target.gram
        return None if gram is None else torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()

    @cached_property
    def layouts(self) -> list[Layout]:
        """The foldings looked at, the one of fewest numbers first."""
        rows, cols = self.matrix.shape
        inputs = self.columns.size
        found = []
        for order in self.kind.orders:
            row_side = _of_order(row_foldings(self.gates, rows // self.gates), order)
            col_side = _of_order(col_foldings(inputs), order)
            for row_modes in islice(row_side, _EACH):
                for col_modes in islice(col_side, _EACH):
                    # Further columns are slabs of the first mode; the rest of the last slab is padding.
                    beside = prod(col_modes[1:])
                    modes = (max(col_modes[0], -(-cols // beside)), *col_modes[1:])
                    found.append(Layout.paired(row_modes, modes, rows=rows, cols=cols))
        return sorted(found, key=lambda layout: self.kind.smallest(layout).parameters)

    @cached_property
    def _reduced(self) -> dict[Layout, tuple[Whitening, Reduced]]:
        """The layouts that do best at the largest budget, and the most compact one, whitened and reduced."""
        made = {}
        for layout in self.layouts:
            whitening = Whitening.of(self.target, layout)
            made[layout] = whitening, Reduced.of(whitening.folded(self.target))
        scores: dict[Layout, float] = {}
        for layout, parts in made.items():
            choices = self._choices(layout, *parts, self.max_parameters)
            scores[layout] = min((choice.error for choice in choices), default=float("inf"))
        kept = sorted(made, key=lambda layout: scores[layout])[:_KEPT]
        return {layout: made[layout] for layout in dict.fromkeys([*kept, *self.layouts[:1]])}

    @property
    def smallest(self) -> int:
        """The fewest numbers that any structure needs."""
        return min((self.kind.smallest(layout).parameters for layout in self.layouts), default=self.matrix.numel())

    def best(self, max_parameters: int, *, polish: bool = False) -> Choice | None:
        """The structure of least error that stores at most so many numbers; None where none does.

        Errors are those of the whitened matrix; `polish` refines the cores in the exact metric and measures.
        """
        choices = [c for layout, parts in self._reduced.items() for c in self._choices(layout, *parts, max_parameters)]
        if choices and polish:
            raw = min(choices, key=lambda c: c.error)
            choices = [self.exact(raw), self._refined(raw)]
        if max_parameters >= self.matrix.numel():
            choices.append(self.dense)
        return min(choices, key=lambda c: (c.error, c.parameters), default=None)

    def ladder(self) -> PlainLadder:
        """The best choices for a rising series of budgets."""
        return PlainLadder(tuple(front([*self._rungs, self.dense])))

    def cheapest(self, rtol: float) -> Choice:
        """The fewest numbers whose relative error (in the metric) is at most `rtol`, measured in float32."""
        limit = rtol**2 * self.total
        budget = self.smallest
        while budget < self.matrix.numel():
            choice = self.best(budget)
            if choice is not None and self.stored_error(choice) <= limit:
                return choice
            budget = int(budget * _CLOSER) + 1
        return self.dense

    @cached_property
    def _rungs(self) -> list[Choice]:
        goals, budget = [self.max_parameters], float(self.smallest)
        while budget < self.max_parameters:
            goals.append(int(budget))
            budget *= _LADDER_RATIO
        return [choice for goal in sorted(goals) if (choice := self.best(goal)) is not None]

    def _choices(self, layout: Layout, whitening: Whitening, reduced: Reduced, budget: int) -> list[Choice]:
        return [self._choice(structure, whitening, reduced) for structure in self.kind.within(layout, reduced, budget)]

    def _choice(self, structure: Structure, whitening: Whitening, reduced: Reduced) -> Choice:
        if structure not in self._known:
            cores = structure.decompose(reduced)
            lost = reduced.core - _within(structure, cores, reduced)
            matrix = NetworkMatrix(structure, tuple(_unwhitened(structure, cores, whitening)))
            error = float(lost.square().sum()) + reduced.lost
            self._known[structure] = Choice(structure.parameters, error, matrix)
        return self._known[structure]

    def _refined(self, choice: Choice) -> Choice:
        if choice.matrix is None:
            return choice
        iterations = ITERATIONS if self.matrix.numel() <= _LARGE else _LARGE_ITERATIONS
        matrix = refine_cores(choice.matrix, self.target, iterations=iterations)
        return Choice(choice.parameters, self.target.error_of(matrix), matrix)


def _of_order(foldings: list[tuple[int, ...]], order: int) -> list[tuple[int, ...]]:
    """The foldings into so many modes, finer ones where there are none; even ones first."""
    found = list(foldings)
    for _ in range(2):
        found += [split for modes in found if len(modes) < order for split in finer(modes)]
    fitting = dict.fromkeys(modes for modes in found if len(modes) == order)
    return sorted(fitting, key=lambda modes: (sum(modes), modes))


def _within(structure: Structure, cores: list[Tensor], reduced: Reduced) -> Tensor:
    """The tensor that the cores make, in the reduced tensor's bases."""
    axis, order = structure.mode_axis, structure.layout.tree.order
    inner = [
        torch.tensordot(basis.T, core, dims=([1], [axis])).movedim(0, axis)
        for core, basis in zip(cores[:order], reduced.bases, strict=True)
    ]
    return structure.contracted(inner, cores[order:], reduced.core)


def _unwhitened(structure: Structure, cores: list[Tensor], whitening: Whitening) -> list[Tensor]:
    axis, order = structure.mode_axis, structure.layout.tree.order
    modal = [
        whitening.removed(k, core.movedim(axis, 0).contiguous()).movedim(0, axis)
        for k, core in enumerate(cores[:order])
    ]
    return [*modal, *cores[order:]]


@dataclass(frozen=True, eq=False)
class PlainLadder(Ladder):
    """Choices that are refined when one of them is taken, and not before."""

    rungs: tuple[Choice, ...]

    @property
    def choices(self) -> tuple[Choice, ...]:
        """As they were decomposed."""
        return self.rungs

    def improved(self, choice: Choice) -> PlainLadder | None:
        """None."""
        return None

    def neighbours(self, choice: Choice) -> tuple[Choice, ...]:
        """None: nothing is improved."""
        return ()

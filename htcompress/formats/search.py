"""The search among structures of one comparison format: the counterpart of `htcompress.matrix.search.Search`."""

from __future__ import annotations

from functools import cached_property
from itertools import islice
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.formats.decompose import Reduced, decompose, smallest, structures_within
from htcompress.formats.format import Format
from htcompress.formats.network_matrix import NetworkMatrix
from htcompress.formats.structure import Structure
from htcompress.matrix.blocks import Blocks
from htcompress.matrix.folding import col_foldings, finer, row_foldings
from htcompress.matrix.layout import Layout
from htcompress.matrix.metric import Metric
from htcompress.matrix.refine import ITERATIONS, refine_cores
from htcompress.matrix.search import Choice, Columns, front
from htcompress.matrix.target import Target
from htcompress.matrix.whitening import Whitening

_ORDERS = {Format.TT: (2, 3, 4), Format.TR: (3, 4), Format.BT: (3, 4)}
_EACH = 2  # foldings of one side looked at for each order
_KEPT = 2  # layouts that are decomposed at every budget
_LADDER_RATIO = 2.0
_LARGE = 1 << 23
_LARGE_ITERATIONS = 12  # of refinement, where every one writes out a large matrix
_CLOSER = 1.3


class NetworkSearch:
    """The structures of one format for one matrix, and the best of them for any budget.

    Foldings pair row and column modes, as the formats' papers do. A few are compared at the largest budget, the best
    go on; cores come from the whitened matrix, and are refined in the exact metric as those of HT are.

    Args:
        form: tensor train, tensor ring or block term.
        others: as for `Search`.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "rows cols"] | Blocks,
        metric: Metric,
        *,
        form: Format,
        max_parameters: int,
        gates: int = 1,
        columns: Columns | None = None,
    ) -> None:
        self.target = Target.of(matrix, metric)
        self.form = form
        self.gates = gates
        self.columns = columns or Columns(matrix.shape[1])
        self.max_parameters = min(max_parameters, matrix.numel())
        self._known: dict[Structure, Choice] = {}

    @property
    def matrix(self) -> Blocks:
        """W."""
        return self.target.matrix

    @property
    def metric(self) -> Metric:
        """What an error counts."""
        return self.target.metric

    @property
    def dense(self) -> Choice:
        """The matrix as it is."""
        return Choice(self.matrix.numel(), 0.0, None)

    @property
    def total(self) -> float:
        """The squared error of a zero matrix: the scale of all errors."""
        return self.target.total

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
        for order in _ORDERS[self.form]:
            row_side = _of_order(row_foldings(self.gates, rows // self.gates), order)
            col_side = _of_order(col_foldings(inputs), order)
            for row_modes in islice(row_side, _EACH):
                for col_modes in islice(col_side, _EACH):
                    # Further columns are slabs of the first mode; the rest of the last slab is padding.
                    beside = prod(col_modes[1:])
                    modes = (max(col_modes[0], -(-cols // beside)), *col_modes[1:])
                    found.append(Layout.paired(row_modes, modes, rows=rows, cols=cols))
        return sorted(found, key=lambda layout: smallest(self.form, layout))

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
        return min((smallest(self.form, layout) for layout in self.layouts), default=self.matrix.numel())

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

    def exact(self, choice: Choice) -> Choice:
        """The choice with its error as it is."""
        if choice.matrix is None:
            return choice
        return Choice(choice.parameters, self.target.error_of(choice.matrix), choice.matrix)

    def ladder(self) -> list[Choice]:
        """The best choices for a rising series of budgets, the dense matrix at its end; a Pareto front."""
        return front([*self._rungs, self.dense])

    def improve(self, choice: Choice) -> bool:
        """Nothing is refined before the last choice."""
        return False

    def neighbours(self, choice: Choice) -> list[Choice]:
        """None: see `improve`."""
        return []

    def cheapest(self, rtol: float) -> Choice:
        """The fewest numbers whose relative error (in the metric) is at most `rtol`, measured in float32."""
        limit = rtol**2 * self.total
        budget = self.smallest
        while budget < self.matrix.numel():
            choice = self.best(budget)
            if choice is not None and isinstance(choice.matrix, NetworkMatrix):
                stored = choice.matrix.balance().map(lambda core: core.float().double())
                if self.target.error_of(stored) <= limit:
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
        return [
            self._choice(structure, whitening, reduced)
            for structure in structures_within(self.form, layout, reduced, budget)
        ]

    def _choice(self, structure: Structure, whitening: Whitening, reduced: Reduced) -> Choice:
        if structure not in self._known:
            cores = decompose(reduced, structure)
            lost = reduced.core - _within(structure, cores, reduced)
            matrix = NetworkMatrix(structure, tuple(_unwhitened(structure, cores, whitening)))
            error = float(lost.square().sum()) + reduced.lost
            self._known[structure] = Choice(structure.parameters, error, matrix)
        return self._known[structure]

    def _refined(self, choice: Choice) -> Choice:
        assert choice.matrix is not None
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


def _axis(structure: Structure, k: int) -> int:
    """Where the core of a mode has the mode: first in a factor, in the middle of a ring's core."""
    return 0 if structure.format is Format.BT else 1


def _modal(structure: Structure, cores: list[Tensor]) -> list[Tensor]:
    return cores[: structure.layout.tree.order]


def _within(structure: Structure, cores: list[Tensor], reduced: Reduced) -> Tensor:
    """The tensor that the cores make, in the reduced tensor's bases."""
    inner = [
        torch.tensordot(basis.T, core, dims=([1], [_axis(structure, k)])).movedim(0, _axis(structure, k))
        for k, (core, basis) in enumerate(zip(_modal(structure, cores), reduced.bases, strict=True))
    ]
    rest = cores[structure.layout.tree.order :]
    if structure.format is Format.BT:
        total = torch.zeros_like(reduced.core)
        for block in range(structure.ranks[0]):
            part = rest[0][..., block]
            for k, factor in enumerate(inner):
                part = torch.tensordot(factor[..., block], part, dims=([1], [k])).movedim(0, k)
            total = total + part
        return total
    product = inner[0]
    for core in inner[1:]:
        product = torch.tensordot(product, core, dims=1)
    return torch.diagonal(product, dim1=0, dim2=-1).sum(-1)


def _unwhitened(structure: Structure, cores: list[Tensor], whitening: Whitening) -> list[Tensor]:
    modal = [
        whitening.removed(k, core.movedim(_axis(structure, k), 0).contiguous()).movedim(0, _axis(structure, k))
        for k, core in enumerate(_modal(structure, cores))
    ]
    return [*modal, *cores[structure.layout.tree.order :]]

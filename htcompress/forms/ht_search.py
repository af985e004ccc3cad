"""The search for a good layout: foldings and trees, compared at equal parameters in the matrix's metric.

The truncated SVD (order two) is always among the candidates and its error is exact, so a search never
returns something worse than it at the same number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

import torch
from torch import Tensor

from htcompress.forms.form import Choice, MatrixSearch, Problem
from htcompress.forms.ht import HTMatrix
from htcompress.forms.ht_decompose import Candidate, Half, RootSplit, Side, SplitCandidate, WholeCandidate, rank_cap
from htcompress.forms.ht_ladder import HTLadder
from htcompress.forms.refine import ITERATIONS, refine_cores
from htcompress.matrix.blocks import LARGE
from htcompress.matrix.folding import col_foldings, finer, pairs, row_foldings, with_slabs
from htcompress.matrix.layout import Layout
from htcompress.matrix.weighted import COARSE, GRAM_ROWS
from htcompress.side_by_side import cached_property, side_by_side
from htcompress.tensor import RankPoint, rank_path
from htcompress.tensor.ranks import ranks_for_error, refine_ranks
from htcompress.vocabulary import LayoutKind

# All of these trade time for error. They were chosen by trial on the sample models.

_LADDER_RATIO, _SVD_RATIO = 1.45, 1.1
"""From one budget of the ladder to the next, and from one truncated SVD to the next: what these lose is known."""

_CLOSE = LARGE
"""Numbers of the factor on the columns' side up to which truncated SVDs stand so close: each holds a part of it."""

_GLIMPSED, _VERIFIED = 2, 8
"""Candidates, those of the lowest bounds, that are decomposed and measured, on the ladder and in the end. With 3 in
place of 8 the sample loses 29 % of its outputs at 5,000 numbers, and not 26."""

_REFINED, _GLANCE, _FINISHED = 4, 10, 2
"""How many of those are refined for a while, by how many iterations, and how many of the best then to the end. With two
and one the sample in 2.5 kB answers .896, .668, .914 and .891 of the clips, by the seed; so .896, .903, .914, .900."""

_RIVAL = 2.0
"""How many times the error of the best choice that of a truncated SVD is at most to stay on the ladder beside it:
rounding loses more of cores that are multiplied with each other."""

_KEPT_FOLDINGS, _ROUNDS = 3, 2
"""Foldings of the columns that are kept, and how often the best of them are split further."""

_SCORED_RANK = 24
"""Leading directions by which foldings are told apart; all of them take twice as long at paper scale."""

_MOST_FACTOR = 1 << 26
"""Numbers of the factor on the columns' side, unless the budget pays for more: 256 MB in float32. It cuts nothing off
of matrices of fewer numbers."""

_ALIKE, _WIDE = 3, 8
"""Matrices of a direction that hold its inputs; columns for each row from which on finding a split again is a product
or two, beside which the eigenvalues of the rows' Gram matrix are little."""

_COARSE_NARROW = 1e-3
"""The part of the error of zero from which on float32 tells errors apart, to a thousandth of them."""

_FLOOR = 1e-9
"""The part of the error of zero below which the sum of singular values' squares is lost in float64's rounding."""

_KNOWN, _KNOWN_LARGE = 4, 2  # rungs, evenly spread, that are refined to tell what that gains on the others
_TRIALS = 4  # decompositions that find how much of an error bound may be asked for


class HTSearch(MatrixSearch):
    """The HT candidates for one matrix, decomposed once, and the best of them for any budget.

    Where another search is `like` this one, the foldings of the inputs that it finds good are taken over.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.kind, self.beside = problem.layout, problem.beside
        self.like = problem.like if isinstance(problem.like, HTSearch) else None
        self._known: dict[tuple[int, tuple[int, ...]], Choice] = {}

    @cached_property
    def foldings(self) -> list[tuple[int, ...]]:
        """The foldings of the inputs worth trying, without slabs for further columns."""
        return self.like.foldings if self.like is not None else self._best_foldings()

    @cached_property
    def spectrum(self) -> Tensor:
        """The leading singular values in the metric."""
        return self._split.values

    @property
    def _cap(self) -> int:
        """The largest rank at the root that is looked at.

        Of a wide matrix many ranks are a large factor, though so small a budget pays for few of them in anything but a
        product of small modes: it holds no more than `_MOST_FACTOR` numbers, or than a truncated SVD within the budget.
        """
        rows, cols = self.matrix.shape
        cap, paid = rank_cap(self.max_parameters, rows, cols), self.max_parameters // max(rows, cols) + 1
        return min(cap, max(paid, _MOST_FACTOR // cols, 1))

    @property
    def _most_factor(self) -> int:
        """Numbers of the factor on the columns' side, at most."""
        return self.matrix.shape[1] * self._cap

    @property
    def _is_large(self) -> bool:
        """Whether what is found on the way is let go of: alone, or beside others where finding it again is cheap."""
        rows, cols = self.matrix.shape
        alike = _ALIKE * self.beside if self.beside > 1 and cols >= _WIDE * rows else 1
        return self._most_factor * alike > LARGE

    @cached_property
    def _split(self) -> RootSplit:
        return RootSplit.of(self.target, cap=self._cap)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The candidates; the truncated SVD first, unless another family was asked for."""
        rows, cols = self.matrix.shape
        whole_rows, whole_cols = (
            Half.of(self._split, Side.ROWS, (rows,)),
            Half.of(self._split, Side.COLS, (cols,)),
        )
        found: list[Candidate] = []
        if self.kind in (LayoutKind.AUTO, LayoutKind.SVD):
            found.append(SplitCandidate(self._split, whole_rows, whole_cols))
        if self.kind in (LayoutKind.AUTO, LayoutKind.SPLIT):
            row_halves = [self._half(Side.ROWS, modes) for modes in self._row_modes()]
            col_halves = self._col_halves()
            found += [
                SplitCandidate(self._split, a, b)
                for a in row_halves
                for b in col_halves
                if len(a.modes) + len(b.modes) > 2 or self.kind is LayoutKind.SPLIT
            ]
        if self.kind is LayoutKind.PAIRED:
            cap = rank_cap(self.max_parameters, rows, cols)
            found += [WholeCandidate.of(self.target, layout, cap=cap) for layout in self._paired()]
        return found

    def _half(self, side: Side, modes: tuple[int, ...]) -> Half:
        return Half.of(self._split, side, modes, max_parameters=self.max_parameters)

    def _row_modes(self) -> list[tuple[int, ...]]:
        rows = self.matrix.shape[0]
        return row_foldings(self.gates, rows // self.gates)

    def _col_halves(self) -> list[Half]:
        """The best foldings of the columns, the whole, and the most compact one."""
        slabs = [self._slabs(modes) for modes in self.foldings]
        kept = dict.fromkeys([*(modes for modes in slabs if modes), (self.matrix.shape[1],), self._most_compact()])
        return [self._half(Side.COLS, modes) for modes in kept]

    def _best_foldings(self) -> list[tuple[int, ...]]:
        """The best foldings of the inputs: pairs first, then the best of them split further."""
        # The leading directions tell good foldings from bad ones; only those that are kept need all.
        split = self._split.leading(_SCORED_RANK)
        row_modes = self._row_modes()
        reference = Half.of(split, Side.ROWS, row_modes[min(1, len(row_modes) - 1)])

        def score(modes: tuple[int, ...]) -> float:
            slabs = self._slabs(modes)
            if slabs is None:
                return inf
            model = SplitCandidate(split, reference, Half.of(split, Side.COLS, slabs, max_rank=_SCORED_RANK)).model
            path = rank_path(model, max_parameters=self.max_parameters)
            goals = [self.max_parameters, self.max_parameters // 3]
            return sum(min((p.tail for p in path if p.parameters <= goal), default=self.total) for goal in goals)

        scores = {modes: score(modes) for modes in col_foldings(self.columns.size)}
        for _ in range(_ROUNDS):
            for modes in sorted(scores, key=lambda m: scores[m])[:2]:
                scores |= {finer: score(finer) for finer in self._finer(modes) if finer not in scores}
        return sorted(scores, key=lambda m: scores[m])[:_KEPT_FOLDINGS]

    def _slabs(self, modes: tuple[int, ...]) -> tuple[int, ...] | None:
        return with_slabs(modes, self.columns.size, self.columns.extra)

    def _finer(self, modes: tuple[int, ...]) -> list[tuple[int, ...]]:
        return finer(modes) if self.columns.size >= 64 and len(modes) > 1 else []

    def _most_compact(self) -> tuple[int, ...]:
        """The column folding of fewest numbers at rank one; always kept, so that `smallest` is one for all budgets."""
        reached = col_foldings(self.columns.size)
        for _ in range(_ROUNDS):
            reached += [split for modes in reached for split in self._finer(modes)]
        slabs = [modes for modes in map(self._slabs, reached) if modes]
        return min(slabs, key=lambda modes: (sum(modes), len(modes)))

    def _paired(self) -> Iterator[Layout]:
        rows, cols = self.matrix.shape
        yield Layout.paired((rows,), (cols,))
        for row_modes in self._row_modes():
            if len(row_modes) == 2:
                for col_modes in map(self._slabs, col_foldings(self.columns.size)[:6]):
                    if col_modes is not None and len(col_modes) == 2:
                        yield Layout.paired(row_modes, col_modes, rows=rows, cols=cols)
            if len(row_modes) == 3:
                for a, b in pairs(self.columns.size + self.columns.extra, most=2):
                    for inner in pairs(b, most=1):
                        yield Layout.paired(row_modes, (a, *inner), rows=rows, cols=cols)

    @cached_property
    def _paths(self) -> list[list[RankPoint]]:
        return [rank_path(form.model, max_parameters=self.max_parameters) for form in self.candidates]

    @cached_property
    def smallest(self) -> int:
        """The fewest numbers that any candidate needs."""
        if self._is_large:
            # What it takes to know this is not kept: whatever else it is needed for is found at the same time.
            _ = self._ladder
        return self._least

    @cached_property
    def _least(self) -> int:
        return min(path[0].parameters for path in self._paths)

    def let_go(self) -> None:
        if self._is_large and "_split" in vars(self):
            _ = self.spectrum
            for name in ("_split", "candidates", "_paths"):
                vars(self).pop(name, None)

    def best(self, max_parameters: int, *, polish: bool = False) -> Choice | None:
        """The candidate of least error that stores at most so many numbers; None where none does.

        The candidates are ranked by their bounds; the first few are decomposed and measured, and so is
        the truncated SVD. `polish` adds a local search over the ranks, and refines the cores of the best.
        """
        options: list[tuple[float, int, RankPoint]] = []
        for index, path in enumerate(self._paths):
            fitting = [p for p in path if p.parameters <= max_parameters]
            if fitting:
                options.append((fitting[-1].tail, index, fitting[-1]))
        options.sort(key=lambda option: option[0])
        first = _VERIFIED if polish else _GLIMPSED
        tried = options[:first] + [o for o in options[first:] if self._is_svd(o[1])]
        svd_rank = max((self._root_rank(o[1], o[2].ranks) for o in options if self._is_svd(o[1])), default=0)
        choices: list[Choice] = []
        for bound, index, point in tried:
            found = [point.ranks]
            if self._is_svd(index):
                # The bound of a truncated SVD is its error.
                if not polish and any(choice.error <= bound for choice in choices):
                    continue
            elif polish:
                # The lower bound is not always the lower error: both are measured.
                found.append(refine_ranks(self.candidates[index].model, point, max_parameters).ranks)
            for ranks in found:
                # No matrix of a rank loses less than the truncated SVD of that rank.
                if self._is_svd(index) or self._root_rank(index, ranks) > svd_rank:
                    choices.append(self._measured(index, ranks))
        if polish:
            # The best few run against each other for a while, the first of them to the end.
            started = side_by_side(self.glanced, _best(choices, _REFINED))
            choices += [*started, *side_by_side(self._refined, _best(started, _FINISHED))]
            choices = [self.exact(choice) for choice in choices]
        if max_parameters >= self.matrix.numel():
            choices.append(self.dense)
        return min(choices, key=lambda c: (c.error, c.parameters), default=None)

    def _refined(self, choice: Choice, *, iterations: int = ITERATIONS) -> Choice:
        """The choice with its cores refined in the exact metric, where that gains anything."""
        if not isinstance(choice.matrix, HTMatrix) or choice.matrix.layout.kind is LayoutKind.SVD:
            return choice
        split = self._split if choice.matrix.layout.is_split else None
        matrix = refine_cores(choice.matrix, self.target, split, iterations=iterations)
        error = self._error_of(matrix)
        return Choice(choice.parameters, error, matrix) if error < choice.error else choice

    def _error_of(self, matrix: HTMatrix) -> float:
        """The squared error, by the split's leading directions where that is exact enough to choose by."""
        factors, own = self.target.factors_of(matrix), self._split.right.dtype
        if factors is not None:
            narrow = [(torch.float32, _COARSE_NARROW)] if own is torch.float64 and self.target.fits_float32 else []
            for dtype, coarse in [*narrow, (own, COARSE)]:
                error = float(self._split.error_of(*(factor.to(dtype) for factor in factors)))
                if error > coarse * self.total:
                    return error
        return self.target.error_of(matrix)

    def _root_rank(self, index: int, ranks: Sequence[int]) -> float:
        """The rank of the candidate as a matrix, where its tree parts rows from columns at the root; else infinite."""
        form = self.candidates[index]
        children = form.layout.tree.root.children
        return inf if children is None or not form.layout.is_split else ranks[children[0]]

    def _is_svd(self, index: int) -> bool:
        return self.candidates[index].layout.kind is LayoutKind.SVD

    def _measured(self, index: int, ranks: tuple[int, ...]) -> Choice:
        key = index, ranks
        if key not in self._known:
            matrix = self.candidates[index].truncate(ranks)
            error = self._split.beyond(ranks[0]) if self._is_svd(index) else 0.0
            # A sum of squares, of a Gram matrix in float64 exact but for the rounding of the largest of them.
            exact = self._split.right.dtype is torch.float64 and self.matrix.shape[0] <= GRAM_ROWS
            coarse = _FLOOR if exact else COARSE
            error = error if error > coarse * self.total else self._error_of(matrix)
            self._known[key] = Choice(matrix.parameters, error, matrix)
        return self._known[key]

    def ladder(self) -> HTLadder:
        """The best choices for a rising series of budgets."""
        return self._ladder

    @cached_property
    def _ladder(self) -> HTLadder:
        rungs, beside = self._rungs
        made = HTLadder(None if self.metric.is_plain else self.glanced, tuple(rungs), tuple(beside), self.dense)
        # A matrix of one row or column has no rung: nothing stores it in fewer numbers than it has.
        apart = -(-len(rungs) // (_KNOWN_LARGE if self._is_large else _KNOWN))
        for rung in rungs[:: -max(1, apart)]:
            made = made.improved(rung) or made
        return made

    def glanced(self, choice: Choice) -> Choice:
        """A choice refined a little."""
        return self._refined(choice, iterations=_GLANCE)

    @cached_property
    def _rungs(self) -> tuple[list[Choice], list[Choice]]:
        """The best choices for a rising series of budgets, and truncated SVDs that may be rivals of them."""
        budget = float(self._least)
        goals = []
        while budget < self.max_parameters:
            goals.append(int(budget))
            budget = max(budget + 1, budget * _LADDER_RATIO)
        goals.append(self.max_parameters)
        found = [choice for goal in goals if (choice := self.best(goal)) is not None]
        # One choice may be the best of several goals.
        once: list[Choice] = []
        for choice in found:
            if choice.matrix is not None and all(choice.matrix is not other.matrix for other in once):
                once.append(choice)
        rivals = [c for c in self._truncated(once) if all(c.matrix is not other.matrix for other in once)]
        # What has lost is asked for no more.
        self._known.clear()
        for form in self.candidates:
            form.let_go()
        return once, rivals

    def _truncated(self, beside: Sequence[Choice]) -> list[Choice]:
        """Truncated SVDs that may be rivals of what is chosen among all."""
        found: list[Choice] = []
        ratio = _SVD_RATIO if self._most_factor <= _CLOSE else _LADDER_RATIO
        for index, path in enumerate(self._paths):
            for point in path if self._is_svd(index) else []:
                best = min((choice.error for choice in beside if choice.parameters <= point.parameters), default=inf)
                apart = not found or point.parameters >= ratio * found[-1].parameters
                if apart and point.tail <= _RIVAL * best:
                    found.append(self._measured(index, point.ranks))
        return found

    def cheapest(self, rtol: float) -> Choice:
        """The fewest numbers whose relative error (in the metric) is at most `rtol`, measured in float32.

        The bound that the ranks come from is often pessimistic, and in a metric that is known by modes only
        it can be too low: a few trials find how much of it may be asked for. Dense, where nothing smaller does.
        """
        limit = rtol**2 * self.total
        best = self.dense
        for index, form in enumerate(self.candidates):
            model = form.model
            share, kept, missed = limit, 0.0, inf
            # Even if every edge could spend all of the error for itself: what cannot win is not measured.
            hopeful = ranks_for_error(model.tree, model.shape, form.spectra, limit * len(model.edges))
            if model.parameters(hopeful) >= best.parameters:
                continue
            for _ in range(_TRIALS):
                ranks = ranks_for_error(model.tree, model.shape, form.spectra, max(0.0, share - model.offset))
                choice = self._measured(index, ranks)
                error = self.stored_error(choice)
                if error > limit:
                    missed = share
                else:
                    kept = share
                    if choice.parameters < best.parameters:
                        best = choice
                if missed <= 1.02 * kept:
                    break
                if kept and missed < inf:
                    share = (kept * missed) ** 0.5
                else:
                    by = limit / max(error, 1e-300)
                    share *= min(2.0, max(1.05, by)) if error <= limit else max(0.1, 0.95 * by)
        return best


def _best(choices: Sequence[Choice], most: int) -> list[Choice]:
    """The first so many by their errors, each once: a bound and a search over ranks may lead to the same choice."""
    first = sorted(choices, key=lambda choice: choice.error)[:most]
    return list({id(choice.matrix): choice for choice in first}.values())

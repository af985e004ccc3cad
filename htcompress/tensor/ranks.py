"""Choosing the ranks of an HT tensor: what they cost, what they lose, and the way from small to full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from torch import Tensor

from htcompress.native import library
from htcompress.tensor.climbing import climbed
from htcompress.tensor.tree import DimensionTree

_SHORT = 20_000  # numbers at full ranks up to which the way down is gone in full
_FINE = 16  # a rank rises by no less than this part of itself: of a rank of 200 one more makes no choice of its own
_STRIDE = 200  # one cut saves at least this part of the numbers, so that large tensors take no more steps


@dataclass(frozen=True)
class RankPoint:
    """One choice of ranks: the numbers it stores and a bound on the squared error it makes."""

    ranks: tuple[int, ...]
    parameters: int
    tail: float


def parameter_count(tree: DimensionTree, shape: Sequence[int], ranks: Sequence[int]) -> int:
    """The numbers a compact HT tensor of these ranks stores (identities are free; see `HTTensor.compact`).

    >>> parameter_count(DimensionTree.balanced(2), (256, 3600), (5, 5, 1))  # truncated SVD: r (M + N)
    19280
    """
    if tree.order == 1:
        return shape[0]
    total = 0
    stored = [False] * len(tree.nodes)
    for node in tree.nodes[:-1]:
        rank = ranks[node.index]
        size = shape[node.leaves[0]] if node.children is None else ranks[node.children[0]] * ranks[node.children[1]]
        if size != rank:
            stored[node.index] = True
            total += size * rank
    left, right = tree.root.children or (0, 0)
    if ranks[left] != ranks[right] or not (stored[left] or stored[right] or (ranks[left] == 1 and total)):
        total += ranks[left] * ranks[right]
    return total


class RankModel:
    """Costs and losses of all ranks of one decomposed tensor, given its singular values at every edge.

    The squared error of a choice of ranks is bounded by the sum of the squared singular values cut off
    at the edges, plus `offset`, what was lost before; the root's two edges are one.
    Source: Grasedyck 2010, theorem 3.11.
    """

    def __init__(
        self, tree: DimensionTree, shape: Sequence[int], spectra: Sequence[Tensor], *, offset: float = 0.0
    ) -> None:
        self.tree = tree
        self.offset = offset
        self.shape = tuple(shape)
        self.full = [len(s) for s in spectra]
        if tree.order > 1:
            left, right = tree.root.children or (0, 0)
            self.full[left] = self.full[right] = min(self.full[left], self.full[right])
        # tails[t][r]: the squared weight beyond rank r at edge t.
        self.tails = []
        for values in spectra:
            squares = (values.double() ** 2).tolist()
            self.tails.append(list(accumulate(reversed(squares), initial=0.0))[::-1])
        # Plain indices: a search asks for tens of thousands of choices.
        self._triples = [(*(node.children or ()), node.index) for node in tree.inner_nodes[:-1]]
        self._root = tree.root.children or (0, 0)
        self._sizes = [shape[n.leaves[0]] if n.children is None else n.children for n in tree.nodes[:-1]]
        skip = {tree.root.index}
        if tree.order > 1:
            skip.add((tree.root.children or (0, 0))[1])
        self.edges = [node.index for node in tree.nodes if node.index not in skip]

    def tail(self, ranks: Sequence[int]) -> float:
        """The bound on the squared error."""
        total = self.offset
        for t in self.edges:
            tails = self.tails[t]
            total += tails[ranks[t]] if ranks[t] < len(tails) else 0.0
        return total

    def parameters(self, ranks: Sequence[int]) -> int:
        """`parameter_count` of these ranks."""
        if self.tree.order == 1:
            return self.shape[0]
        total, (left, right) = 0, self._root
        stored_left = stored_right = False
        for t, below in enumerate(self._sizes):
            size = below if isinstance(below, int) else ranks[below[0]] * ranks[below[1]]
            if size != ranks[t]:
                total += size * ranks[t]
                stored_left |= t == left
                stored_right |= t == right
        if ranks[left] != ranks[right] or not (stored_left or stored_right or (ranks[left] == 1 and total)):
            total += ranks[left] * ranks[right]
        return total

    def point(self, ranks: Sequence[int]) -> RankPoint:
        return RankPoint(tuple(ranks), self.parameters(ranks), self.tail(ranks))

    def smallest(self) -> list[int]:
        return [1] * len(self.tree.nodes)

    def raised(self, ranks: Sequence[int], edge: int, by: int) -> list[int] | None:
        """The ranks with one edge raised, and whatever else must rise for them to be attainable.

        At every inner node no rank may exceed the product of the other two. None where the edge is full.
        """
        if ranks[edge] >= self.full[edge]:
            return None
        new = list(ranks)
        new[edge] = min(self.full[edge], new[edge] + by)
        return self._repair(new)

    def _repair(self, ranks: list[int]) -> list[int] | None:
        left, right = self._root
        full, tails = self.full, self.tails
        changed = True
        while changed:
            changed = False
            if ranks[left] != ranks[right]:
                ranks[left] = ranks[right] = max(ranks[left], ranks[right])
                changed = True
            for a, b, t in self._triples:
                for x, y, z in ((a, b, t), (b, a, t), (t, a, b)):
                    if ranks[x] <= ranks[y] * ranks[z]:
                        continue
                    # Raise the neighbour that can still rise and recovers more.
                    best, gain = -1, -1.0
                    for u in (y, z):
                        if ranks[u] < full[u] and tails[u][ranks[u]] - tails[u][ranks[u] + 1] > gain:
                            best, gain = u, tails[u][ranks[u]] - tails[u][ranks[u] + 1]
                    if best < 0:
                        return None
                    ranks[best] += 1
                    changed = True
        return ranks

    def lowered(self, ranks: Sequence[int], edge: int, by: int) -> list[int] | None:
        """The ranks with one edge lowered, and whatever else must fall for them to be attainable."""
        if ranks[edge] <= by:
            return None
        new = list(ranks)
        new[edge] -= by
        left, right = self._root
        changed = True
        while changed:
            changed = new[left] != new[right]
            new[left] = new[right] = min(new[left], new[right])
            for a, b, t in self._triples:
                for x, y, z in ((a, b, t), (b, a, t), (t, a, b)):
                    if new[x] > new[y] * new[z]:
                        new[x] = new[y] * new[z]
                        changed = True
        return new

    def cuts(self, ranks: Sequence[int]) -> list[list[int]]:
        """Smaller choices worth a look: each edge lowered by one, by a few, by half."""
        found = {}
        for edge in self.edges:
            for by in {1, 2, ranks[edge] // 4, ranks[edge] // 2} - {0}:
                new = self.lowered(ranks, edge, by)
                if new is not None:
                    found[tuple(new)] = new
        return list(found.values())

    def moves(self, ranks: Sequence[int]) -> list[list[int]]:
        """Next choices worth a look: each edge raised by a little, by a quarter, to full; pairs along the tree."""
        found: dict[tuple[int, ...], list[int]] = {}

        def add(candidate: list[int] | None) -> None:
            if candidate is not None:
                found.setdefault(tuple(candidate), candidate)

        for edge in self.edges:
            for by in (max(1, ranks[edge] // _FINE), max(2, ranks[edge] // 4)):
                add(self.raised(ranks, edge, by))
            if self.full[edge] - ranks[edge] <= 8:
                add(self.raised(ranks, edge, self.full[edge]))
        for node in self.tree.inner_nodes:
            family = [t for t in (*(node.children or ()), node.index) if ranks[t] < self.full[t]]
            for i, first in enumerate(family):
                for second in family[i + 1 :]:
                    pair = list(ranks)
                    pair[first] += 1
                    pair[second] += 1
                    add(self._repair(pair))
        return list(found.values())


def rank_path(model: RankModel, *, max_parameters: float = inf) -> list[RankPoint]:
    """The Pareto front of two greedy ways, ascending: upwards from rank one, and downwards from full ranks.

    All that was looked at on the way counts: a move of several ranks may pass over points that are the best
    of their size. With one edge alone that is every rank. The first point is rank one; the last within a
    budget is the choice for it; along one path a larger budget never gives a larger bound.
    """
    seen = _upwards(model, max_parameters=max_parameters)
    # The way down pays where it is short; far above the budget it says nothing about choices within it.
    if model.parameters(model.full) <= min(_SHORT, 4 * max_parameters):
        seen += _downwards(model)
    return pareto([seen[0], *(p for p in seen if p.parameters <= max_parameters)])


def _upwards(model: RankModel, *, max_parameters: float = inf, max_tail: float = 0.0) -> list[RankPoint]:
    """From rank one, always the move that gains most per number, until the bound is small enough.

    All points seen, the first of them first; by the program of C those that beat the others.
    """
    program = library() if model.tree.order > 1 else None
    if program is not None:
        found = climbed(program, model, _FINE, max_parameters, max_tail)
        chosen = [RankPoint(*found.point(at)) for at in (0, *found.front())]
        return chosen + (list(_along_the_root(model, RankPoint(*found.point(found.last)))) if found.is_open else [])
    current = model.point(model.smallest())
    seen = [current]
    root = model.edges and model.tree.root.children
    while current.tail > max_tail:
        if root and all(current.ranks[edge] == model.full[edge] for edge in model.edges if edge != root[0]):
            # Only the root's rank is left to rise.
            return seen + list(_along_the_root(model, current))
        best, best_rate = None, -inf
        for ranks in model.moves(current.ranks):
            point = model.point(ranks)
            if point.parameters > max_parameters:
                continue
            seen.append(point)
            gain, cost = current.tail - point.tail, point.parameters - current.parameters
            rate = gain / cost if cost > 0 else inf
            if (gain > 0 or cost <= 0) and rate > best_rate:
                best, best_rate = point, rate
        if best is None or best.ranks == current.ranks:
            break
        current = best
    return seen


def _along_the_root(model: RankModel, start: RankPoint) -> Iterator[RankPoint]:
    """The points of higher ranks at the root up to full, which may store less than those before it."""
    root, fine = (model.tree.root.children or (0, 0))[0], len(model.edges) > 1
    ranks = model.raised(start.ranks, root, max(1, start.ranks[root] // _FINE) if fine else 1)
    while ranks is not None:
        yield model.point(ranks)
        ranks = model.raised(ranks, root, max(1, ranks[root] // _FINE) if fine else 1)


def _downwards(model: RankModel, *, max_tail: float = inf) -> list[RankPoint]:
    """From full ranks, always the cut that loses least per number saved, while the bound holds; all points seen."""
    current = model.point(model.full)
    seen = [current]
    while True:
        best, best_rate = None, inf
        for ranks in model.cuts(current.ranks):
            point = model.point(ranks)
            if point.tail > max_tail:
                continue
            seen.append(point)
            saved = current.parameters - point.parameters
            if saved > current.parameters // _STRIDE and (point.tail - current.tail) / saved < best_rate:
                best, best_rate = point, (point.tail - current.tail) / saved
        if best is None:
            return seen
        current = best


def pareto(points: Sequence[RankPoint]) -> list[RankPoint]:
    """The points that no other beats in both numbers and bound, by ascending numbers."""
    front: list[RankPoint] = []
    for point in sorted(points, key=lambda p: (p.parameters, p.tail)):
        if not front or point.tail < front[-1].tail:
            front.append(point)
    return front


def refine_ranks(model: RankModel, start: RankPoint, max_parameters: float) -> RankPoint:
    """Local search from a greedy choice: lower one edge, spend what it frees elsewhere; keep what gains."""
    best = start
    improved = True
    while improved:
        improved = False
        for edge in model.edges:
            lowered = list(best.ranks)
            if lowered[edge] == 1:
                continue
            lowered[edge] -= 1
            if model.tree.root.children and edge == model.tree.root.children[0]:
                lowered[model.tree.root.children[1]] -= 1
            if not _attainable(model, lowered):
                continue
            trial = model.point(lowered)
            while True:
                steps = [model.point(r) for r in model.moves(trial.ranks)]
                steps = [p for p in steps if p.parameters <= max_parameters and p.tail < trial.tail]
                if not steps:
                    break
                trial = min(steps, key=lambda p: p.tail)
            if trial.tail < best.tail and trial.parameters <= max_parameters:
                best, improved = trial, True
                break
    return best


def _attainable(model: RankModel, ranks: list[int]) -> bool:
    for node in model.tree.inner_nodes[:-1]:
        a, b = node.children or (0, 0)
        triple = (ranks[a], ranks[b], ranks[node.index])
        if 2 * max(triple) > 0 and max(triple) ** 2 > triple[0] * triple[1] * triple[2]:
            return False
    return True


def ranks_for_budget(
    tree: DimensionTree, shape: Sequence[int], spectra: Sequence[Tensor], max_parameters: int
) -> tuple[int, ...] | None:
    """The ranks of least error bound that store at most `max_parameters` numbers; None where none fit."""
    model = RankModel(tree, shape, spectra)
    path = [p for p in rank_path(model, max_parameters=max_parameters) if p.parameters <= max_parameters]
    if not path:
        return None
    found = [refine_ranks(model, path[-1], max_parameters)]
    full = model.point(model.full)
    if full.parameters <= max_parameters:
        found.append(full)
    return min(found, key=lambda p: (p.tail, p.parameters)).ranks


def ranks_for_error(
    tree: DimensionTree, shape: Sequence[int], spectra: Sequence[Tensor], max_tail: float
) -> tuple[int, ...]:
    """The fewest numbers found whose error bound, squared, is at most `max_tail`."""
    model = RankModel(tree, shape, spectra)
    full = model.point(model.full)
    seen = [*_upwards(model, max_tail=max_tail), *_downwards(model, max_tail=max_tail)]
    return min((p for p in seen if p.tail <= max_tail), key=lambda p: (p.parameters, p.tail), default=full).ranks

"""The multiple-choice knapsack: one item of each group, of least total error for every size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

_MERGED = 4000
"""Combinations that are gone on with; a few dozen items a group stay far below, and then the result is exact."""

_CLASSES = 1 << 14
"""Of sizes, by which combinations are looked through before they are sorted."""


@runtime_checkable
class Item(Protocol):
    """What can be taken."""

    @property
    def size(self) -> int: ...

    @property
    def error(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Combinations:
    """Those that no other beats in both size and error, by ascending size.

    Attributes:
        sizes: (k,), their sizes.
        errors: (k,), what their errors come to.
        items: (groups, k), which item of each group they take.
    """

    sizes: NDArray[np.int64]
    errors: NDArray[np.float64]
    items: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sizes)


def combined(groups: Sequence[Sequence[Item]], most: int, weights: Sequence[float] | None = None) -> Combinations:
    """The combinations of one item of each group.

    Groups are merged one after the other, and only what no other combination beats is kept.

    Args:
        groups: of which one item each is taken.
        most: the size that none exceeds.
        weights: of each group, what its errors are multiplied by.
    """
    sizes, errors = np.zeros(1, np.int64), np.zeros(1)
    items = np.zeros((0, 1), np.int64)
    for group, weight in zip(groups, weights or [1.0] * len(groups), strict=True):
        every_size = sizes[:, None] + np.array([item.size for item in group], np.int64)
        every_error = errors[:, None] + weight * np.array([item.error for item in group], np.float64)
        before, taken = np.nonzero(every_size <= most)
        own_sizes, own_errors = every_size[before, taken], every_error[before, taken]
        # Most are beaten by some of a smaller size by far: what is left is little to be sorted.
        hopeful = _unbeaten(own_sizes, own_errors)
        before, taken = before[hopeful], taken[hopeful]
        own_sizes, own_errors = own_sizes[hopeful], own_errors[hopeful]
        order = np.lexsort((own_errors, own_sizes))
        least = np.minimum.accumulate(own_errors[order])
        better = np.append(True, least[1:] < least[:-1])[: len(order)]
        kept = order[better]
        # Too many to go on with: keep an even spread and both ends.
        step = -(-len(kept) // _MERGED) or 1
        kept = np.append(kept[::step], kept[-1:]) if step > 1 else kept
        sizes, errors = own_sizes[kept], own_errors[kept]
        items = np.vstack([items[:, before[kept]], taken[kept]])
    return Combinations(sizes, errors, items)


def _unbeaten(sizes: NDArray[np.int64], errors: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Those whose error is below all that any of a lower class of sizes has; the others are beaten."""
    if not len(sizes):
        return np.zeros(0, bool)
    low = int(sizes.min())
    classes = (sizes - low) // ((int(sizes.max()) - low) // _CLASSES + 1)
    least = np.full(_CLASSES + 1, np.inf)
    np.minimum.at(least, classes + 1, errors)
    unbeaten: NDArray[np.bool_] = errors < np.minimum.accumulate(least)[classes]
    return unbeaten

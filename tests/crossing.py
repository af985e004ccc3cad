"""Cross products of options: some cases always, all of them in a full run (`pytest --full`)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

FULL = os.environ.get("HTCOMPRESS_FULL_TESTS") == "1"
"""Whether this is a full run; `conftest.py` sets it."""


def crossed(cases: Sequence[tuple[Any, ...]], together: int = 2) -> list[Any]:
    """Cases for `parametrize`, of which a small run takes enough that every pair (or so many) of options meets.

    Dicts are options by their names. What is taken does not depend on the order of the cases.
    """
    shuffled = sorted(cases, key=str)
    random.Random(0).shuffle(shuffled)
    seen: set[Any] = set()
    kept = []
    for case in shuffled:
        pairs = set(combinations(sorted(_options(case)), together))
        if pairs - seen:
            seen |= pairs
            kept.append(case)
    return [case if case in kept else pytest.param(*case, marks=pytest.mark.full) for case in cases]


def some(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values for `parametrize`, of which a small run takes those that are kept."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.full) for value in values]


def examples(full: int) -> int:
    """How many examples of a property to draw: so many in a full run, a third otherwise."""
    return full if FULL else max(1, full // 3)


def _options(case: Iterable[Any]) -> list[str]:
    found = []
    for index, value in enumerate(case):
        found += [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [f"{index}={value}"]
    return found

"""The batches of fine-tuning: a few of them held out, the others without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from htcompress.errors import TaskError
from htcompress.values import leaves

Batches = Callable[[], Iterator[tuple[Sequence[Any], Any]]]
"""Starts a pass over the training data: pairs of arguments and target (None: no target)."""

_HELD_OUT, _PART = 12, 4
"""At most so many batches are held out, and one in so many of those looked at: enough that the choice among some
twenty states does not follow the noise of a batch, and looking at them costs a tenth of the training between."""

_KEPT = 2**28
"""Bytes of the batches that are kept at a time while it is decided which to hold out."""

_LONGEST = 1_000_000
"""Batches of a pass beyond which it is taken to have no end."""


class Stream:
    """The batches of passes over the training data; the first few of each pass are held out.

    Attributes:
        held: those that are held out.
        passes: how many passes have come to their end.
    """

    def __init__(self, batches: Batches, held_out: int | None) -> None:
        """Take what is held out from the first pass: `held_out` batches, or a quarter of those at its beginning.

        Raises `TaskError` where the data has fewer than two batches.
        """
        self._batches, self.passes = batches, 0
        first = iter(batches())
        most = _HELD_OUT * _PART if held_out is None else held_out + 1
        seen, kept = [], 0
        for item in islice(first, most):
            seen.append(item)
            kept += sum(tensor.nbytes for tensor in leaves(item))
            if held_out is None and kept > _KEPT and len(seen) > 1:
                break
        if len(seen) < 2:
            raise TaskError(
                f"Fine-tuning needs at least two batches, one of them held out; training() yields {len(seen)}. "
                f"Yield smaller batches, or convert with --no-finetune."
            )
        count = max(1, len(seen) // _PART) if held_out is None else min(held_out, len(seen) - 1)
        self.held = seen[:count]
        self._rest = self._endless(seen[count:], first)

    def __next__(self) -> tuple[Sequence[Any], Any]:
        """The next batch to train on."""
        return next(self._rest)

    def length(self) -> int:
        """Batches to train on in a pass, counted in one. Raises `TaskError` where it has no end."""
        count = sum(1 for _ in islice(self._batches(), _LONGEST))
        if count == _LONGEST:
            raise TaskError(f"A pass over training() has not ended after {_LONGEST:,} batches; give --steps.")
        return max(1, count - len(self.held))

    def _endless(
        self, seen: list[tuple[Sequence[Any], Any]], first: Iterator[tuple[Sequence[Any], Any]]
    ) -> Iterator[tuple[Sequence[Any], Any]]:
        yield from seen
        yield from first
        while True:
            self.passes += 1
            count = 0
            for count, item in enumerate(self._batches(), start=1):
                if count > len(self.held):
                    yield item
            if count <= len(self.held):
                raise TaskError(
                    f"Fine-tuning ran out of data: called again, training() yields {count} batches, no more than "
                    f"are held out. Let every call start a new pass; a generator can be read only once."
                )

"""The batches of fine-tuning: a few of them held out, the others without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from htcompress.errors import TaskError
from htcompress.isolation import Draws
from htcompress.values import leaves

Item = tuple[Sequence[Any], Any]
"""The arguments of the model and the target (None: no target)."""

Batches = Callable[[], Iterator[Item]]
"""Starts a pass over the training data."""

_HELD_OUT, _PART = 12, 4
"""At most so many groups of batches are held out, and every so manieth of those looked at: enough that the choice among
some twenty states does not follow the noise of a batch, and looking at them costs a tenth of the training between. They
are not the first, for data may be sorted by its classes, nor quite regular, for it may alternate."""

_KEPT = 2**28
"""Bytes of the batches that are kept at a time while it is decided which to hold out."""

_LONGEST = 1_000_000
"""Batches of a pass beyond which it is taken to have no end."""


@dataclass(frozen=True)
class Share:
    """Which batches of a step are those of this process.

    The batches of a step are as many that follow each other in a pass, a *group*; it stands for one batch in which
    they are joined. Of each group process k of n takes the batches k, k + n, ...

    Args:
        processes: how many take part.
        process: which of them this is.
        accumulated: batches that each takes for a step.
    """

    processes: int = 1
    process: int = 0
    accumulated: int = 1

    @property
    def group(self) -> int:
        """Batches of a step, of all processes."""
        return self.processes * self.accumulated

    def own(self, items: Sequence[Any]) -> list[Any]:
        """Those of this process, of what belongs to the batches of a group, or of several whole ones."""
        return [item for i, item in enumerate(items) if i % self.group % self.processes == self.process]


@dataclass(frozen=True)
class Group:
    """The batches of a step: those of this process, and how many they are in all."""

    own: list[Item]
    count: int


def _spread(count: int) -> list[int]:
    """About every fourth of so many places, even and odd ones, and one at least."""
    return [k * _PART + k % 2 for k in range(max(1, count // _PART))]


class Stream:
    """The batches of passes over the training data, group by group; some of the first of each pass are held out.

    Attributes:
        held: the batches that are held out, of all processes.
        passes: how many passes have come to their end.
        taken: how many groups have been taken.
    """

    def __init__(
        self, batches: Batches, held_out: int | None, share: Share | None = None, *, apart: bool = False
    ) -> None:
        """Take what is held out from the first pass: `held_out` groups, or every fourth of those at its beginning.

        Groups that are held out are whole; where there is no more than one, every fourth of its batches is.

        Args:
            apart: the data draws from random sequences of its own, whatever the models draw: all processes are given
                the same batches, and so is a run that starts anew.

        Raises `TaskError` where the data has fewer than two batches.
        """
        self._batches, self._share, self.passes, self.taken = batches, share or Share(), 0, 0
        size = self._share.group
        first = iter(batches())
        most = (_HELD_OUT * _PART if held_out is None else held_out + 1) * size
        seen: list[Item] = []
        kept = 0
        for item in islice(first, most):
            seen.append(item)
            kept += sum(tensor.nbytes for tensor in leaves(item))
            if held_out is None and kept > _KEPT and len(seen) > 1:
                break
        if len(seen) < 2:
            raise TaskError(
                f"Fine-tuning needs at least two batches, one of them held out; what there is to train on has "
                f"{len(seen)}. Yield smaller batches, let every call of training() or calibration() start a new pass "
                f"(a generator can be read only once), or convert with --no-finetune."
            )
        groups = -(-len(seen) // size)
        if groups < 2:
            self._held = frozenset(_spread(len(seen)))
        else:
            places = _spread(groups) if held_out is None else range(min(held_out, groups - 1))
            self._held = frozenset(place * size + i for place in places for i in range(size))
        self.held = [item for at, item in enumerate(seen) if at in self._held]
        self._draws = Draws() if apart else nullcontext
        self._rest = self._endless([item for at, item in enumerate(seen) if at not in self._held], first)

    def __next__(self) -> Item:
        """The next batch to train on, where a group is one batch."""
        (item,) = self.take().own
        return item

    def take(self) -> Group:
        """The next group to train on."""
        self.taken += 1
        with self._draws():
            return next(self._rest)

    def length(self) -> int:
        """Groups to train on in a pass, counted in one. Raises `TaskError` where it has no end."""
        with self._draws():
            count = sum(1 for _ in islice(self._batches(), _LONGEST))
        if count == _LONGEST:
            raise TaskError(f"A pass over training() has not ended after {_LONGEST:,} batches; give --steps.")
        if count <= len(self._held):
            raise self._ran_out(count)
        return -(-(count - len(self._held)) // self._share.group)

    def skip(self, groups: int) -> None:
        """Go on as if so many groups had been taken; they are read once more."""
        for _ in range(groups):
            self.take()

    def _endless(self, seen: list[Item], first: Iterator[Item]) -> Iterator[Group]:
        yield from self._grouped(chain(seen, first))
        while True:
            self.passes += 1
            found = 0

            def counted() -> Iterator[Item]:
                nonlocal found
                for item in self._batches():
                    found += 1
                    if found - 1 not in self._held:
                        yield item

            yield from self._grouped(counted())
            if found <= len(self._held):
                raise self._ran_out(found)

    def _ran_out(self, found: int) -> TaskError:
        return TaskError(
            f"Fine-tuning ran out of data: called again, training() yields {found} batches, no more than "
            f"are held out. Let every call start a new pass; a generator can be read only once."
        )

    def _grouped(self, items: Iterator[Item]) -> Iterator[Group]:
        """Groups of items, the last as large as what is left; without a pass's end being looked for before it comes."""
        while group := list(islice(items, self._share.group)):
            yield Group(self._share.own(group), len(group))

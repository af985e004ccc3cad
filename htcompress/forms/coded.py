"""The choices for a matrix where bytes count: those of a search in numbers, and the dense matrix, each in fewer bits.

What rounding will lose is expected from one trial a choice, in four bits and without feedback; choices that turn out to
matter are rounded as they will be stored, and what that came to corrects what is expected of the others.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htcompress.forms.core_problem import Feedback
from htcompress.forms.dense import DenseMatrix
from htcompress.forms.form import Choice, Ladder, MatrixSearch, Search, front
from htcompress.forms.rounding import Rounded, can_be_turned, rounded_plainly, rounded_with_feedback, spread
from htcompress.matrix.stored import StoredMatrix
from htcompress.side_by_side import cached_property
from htcompress.storage import Codec, codec_within
from htcompress.storage.integer import Integer
from htcompress.storage.registry import PLAIN
from htcompress.vocabulary import INTEGER_BITS, WIDEST

_LOST = {8: 1.04e-4, 7: 3.5e-4, 6: 1.04e-3, 5: 3.5e-3, 4: 1.15e-2, 3: 3.74e-2, 2: 0.119}
"""The part of a normal variable's square that its best uniform grid of so many bits loses (Max 1960, table II)."""

_FLOATS = {2: torch.float16, 4: torch.float32, 8: torch.float64}
"""A type of numbers of so many bytes."""

_TRIED = 4
"""Bits of the trial."""

_TRIALS = 6
"""The choices of a matrix that are tried, at most; as many folded ones."""

_NEAR = 2
"""The choices on either side of one that is chosen that are rounded, too: what rounding comes to is a draw of luck."""

_TURNS, _TURNED = 8, 1 << 18
"""How often a matrix that is chosen is rounded, its bases turned otherwise each time, and of how many numbers in all.
Where one direction is much larger than the others the error is anything from one to three times the least."""

_FEEDBACK = 0.3
"""What feedback leaves of the loss, before anything was rounded with it."""


@dataclass(frozen=True, eq=False)
class CodedChoice(Choice):
    """A choice in so many bits a number; `expected`: not rounded yet, `source`: what was rounded."""

    bits: int = WIDEST
    expected: bool = True
    source: StoredMatrix | None = None


def coded(choice: Choice, feedback: Feedback, bits: int, seed: int = 0) -> CodedChoice:
    """A choice as it is stored in so many bits a number, its error what it comes to with bases turned by the seed."""
    if bits not in INTEGER_BITS:
        raise ValueError(f"Numbers are whole in {INTEGER_BITS} bits, not in {bits}.")
    dense = choice.matrix is None or choice.matrix.is_dense
    own = None if dense else choice.matrix
    made = rounded_with_feedback(_spread(own, feedback, seed), feedback, bits)
    return CodedChoice(
        choice.parameters, made.error, made.matrix, made.bytes, _named(made), bits, expected=False, source=own
    )


def _spread(matrix: StoredMatrix | None, feedback: Feedback, seed: int = 0) -> StoredMatrix:
    """What is rounded of a matrix; None: of the dense one."""
    return DenseMatrix(feedback.dense.best) if matrix is None else spread(matrix, seed)


def _named(made: Rounded) -> Mapping[str, tuple[Integer, Tensor | None]]:
    every = zip(made.matrix.core_names, made.codecs, made.scales, strict=True)
    return {name: (codec, scales) for name, codec, scales in every if codec is not None}


def through(matrix: StoredMatrix, codec: Codec) -> tuple[StoredMatrix, dict[str, tuple[Codec, Tensor | None]]]:
    """A matrix as a codec without scales gives it back, and which of its cores it holds; others stay as they are."""
    every: list[Any] = []
    codecs: dict[str, tuple[Codec, Tensor | None]] = {}
    for name, core in zip(matrix.core_names, matrix.cores, strict=True):
        every.append(core)
        if codec is not PLAIN and isinstance(core, Tensor) and codec.holds(core):
            every[-1], codecs[name] = codec.rounded(core), (codec, None)
    return matrix.with_cores(every), codecs


class CodedSearch(Search):
    """The candidates of a search in numbers, in each of some numbers of bits; sizes are bytes.

    Args:
        base: the search in numbers.
        bits: that may be chosen from.
        width: of the model's own numbers, in bytes.
        dense: whether the dense matrix may be rounded, too.
        most: bytes beyond which the dense matrix is not rounded, since it cannot be chosen; None: no limit.
    """

    def __init__(
        self, base: MatrixSearch, bits: Sequence[int], *, width: int, dense: bool, most: int | None = None
    ) -> None:
        self.base, self.bits, self.width, self.rounds_dense = base, tuple(bits), width, dense
        self.most = sys.maxsize if most is None else most
        self.target = base.target
        self.feedback = Feedback(base.target)
        self._dense: dict[int, CodedChoice] = {}

    @property
    def in_numbers(self) -> MatrixSearch:
        return self.base

    @property
    def dense(self) -> Choice:
        return replace(self.base.dense, bytes=self.width * self.matrix.numel())

    @property
    def spectrum(self) -> Tensor | None:
        return self.base.spectrum

    @cached_property
    def smallest(self) -> int:
        every = [c for c in self._base_ladder.every if c.matrix is not None or self.rounds_dense]
        return min((self.bytes_of(c, bits) for c in every[:1] for bits in self.bits), default=self.dense.size)

    @cached_property
    def _base_ladder(self) -> Ladder:
        return self.base.ladder()

    def ladder(self) -> CodedLadder:
        return CodedLadder(self, self._base_ladder)

    def bytes_of(self, choice: Choice, bits: int) -> int:
        """What a choice takes in so many bits a number."""
        if bits not in INTEGER_BITS:
            return choice.parameters * (self.width if bits == WIDEST else min(self.width, bits // 8))
        if choice.matrix is None:
            return Integer(bits, by_rows=True).bytes(self.matrix.shape, torch.float32)
        cores = (core for core in choice.matrix.cores if isinstance(core, Tensor))
        return sum(Integer(bits).bytes(tuple(core.shape), core.dtype) for core in cores)

    def rounded(self, bits: int) -> Choice | None:
        if not self.rounds_dense:
            return None
        own = self.base.dense
        return CodedChoice(own.parameters, own.error, None, self.bytes_of(own, bits), {}, bits)

    def lost(self, choice: Choice) -> float:
        """What the trial loses beyond the choice's own error; between those that were tried, what theirs come to."""
        if choice.matrix is None:
            return self._lost_by_dense
        numbers, lost = self._trials[choice.folds]
        return float(np.exp(np.interp(log(choice.parameters), numbers, lost)))

    @cached_property
    def _lost_by_dense(self) -> float:
        return self._tried(self.base.dense)

    @cached_property
    def _trials(self) -> dict[bool, tuple[list[float], list[float]]]:
        """The logarithms of some choices' numbers, ascending, and of what rounding them lost; the folded ones apart."""
        found = {}
        for folds in (False, True):
            alike = [c for c in self._base_ladder.every if c.matrix is not None and c.folds is folds]
            some = [*alike[:: -(-len(alike) // (_TRIALS - 1)) or 1], *alike[-1:]]
            found[folds] = [log(c.parameters) for c in some], [log(self._tried(c)) for c in some]
        return found

    def _tried(self, choice: Choice) -> float:
        tried = rounded_plainly(_spread(choice.matrix, self.feedback), self.target, _TRIED).error
        own = 0.0 if choice.matrix is None else self.target.error_of(choice.matrix)
        return max(tried - own, 1e-12 * self.total, 1e-300)

    def stored(self, choice: Choice, bits: int) -> CodedChoice:
        """A choice as it is stored in so many bits a number; in 16 or more its rounding is harmless."""
        if bits in INTEGER_BITS:
            if choice.matrix is not None:
                return coded(choice, self.feedback, bits)
            if bits not in self._dense:
                self._dense[bits] = coded(choice, self.feedback, bits)
            return self._dense[bits]
        matrix = DenseMatrix(self.matrix.dense()) if choice.matrix is None else choice.matrix.balance()
        found, codecs = through(matrix, codec_within(bits, _FLOATS[self.width]))
        size = sum(
            codecs.get(name, (PLAIN, None))[0].bytes(tuple(core.shape), _FLOATS[self.width])
            for name, core in zip(found.core_names, found.cores, strict=True)
            if isinstance(core, Tensor)
        )
        return CodedChoice(choice.parameters, choice.error, found, size, codecs, bits, expected=False)

    def grown(self, choice: Choice, size: int) -> Choice | None:
        if not isinstance(choice, CodedChoice) or choice.matrix is None or choice.matrix.is_dense:
            return None
        # As many numbers as fit, less what scales and odd bits take.
        numbers = int(choice.parameters * size / max(1, choice.size))
        for _ in range(4):
            found = self.base.best(numbers, polish=True)
            if found is None or found.matrix is None:
                return None
            taken = self.bytes_of(found, choice.bits)
            if taken <= size:
                return self.stored(found, choice.bits)
            numbers -= max(1, -(-(taken - size) * 8 // choice.bits))
        return None

    def polished(self, choice: Choice) -> Choice:
        if not isinstance(choice, CodedChoice) or choice.source is None or not can_be_turned(choice.source):
            return choice
        whole = replace(choice, matrix=choice.source)
        turns = min(_TURNS, 1 + _TURNED // choice.parameters)
        others = (coded(whole, self.feedback, choice.bits, seed) for seed in range(1, turns))
        return min([choice, *others], key=lambda c: c.error)

    def cheapest(self, rtol: float) -> Choice:
        """Errors are kept by a search in numbers."""
        return self.base.cheapest(rtol)

    def let_go(self) -> None:
        self.base.let_go()

    def exact(self, choice: Choice) -> Choice:
        if not isinstance(choice, CodedChoice):
            return choice
        if choice.expected:
            return self.stored(choice, choice.bits)
        return choice if choice.matrix is None else replace(choice, error=self.target.error_of(choice.matrix))


_Kind = tuple[int, bool, bool]
"""What tells the choices of a matrix apart: its numbers, whether it is dense, and whether it is folded."""


def _kind(choice: Choice) -> _Kind:
    return choice.parameters, choice.is_dense, choice.folds


@dataclass(frozen=True, eq=False)
class CodedLadder(Ladder):
    """The choices of a `CodedSearch`, some of them rounded as they will be stored.

    Attributes:
        base: the choices in numbers.
        known: those that were rounded, by what they are of and their bits.
    """

    search: CodedSearch
    base: Ladder
    known: Mapping[tuple[_Kind, int], CodedChoice] = field(default_factory=dict)

    @cached_property
    def choices(self) -> Sequence[Choice]:
        kept = [choice for choice in self.base.every if choice.matrix is not None]
        found = [self._as(choice, bits) for choice in kept for bits in self.search.bits]
        own = self.search.base.dense
        # What rounding a large matrix loses is dear to find out.
        fitting = [bits for bits in self.search.bits if self.search.bytes_of(own, bits) <= self.search.most]
        found += [self._as(own, bits) for bits in fitting if self.search.rounds_dense]
        return front([*found, self.search.dense])

    def improved(self, choice: Choice) -> CodedLadder | None:
        if not isinstance(choice, CodedChoice) or not choice.expected:
            return None
        base, own = self.base, self._own(self.base, choice)
        if own.matrix is not None:
            base = base.improved(own) or base
            own = self._own(base, choice)
        made = self.search.stored(own, choice.bits)
        return replace(self, base=base, known={**self.known, (_kind(choice), choice.bits): made})

    def neighbours(self, choice: Choice) -> Sequence[Choice]:
        at = next((k for k, c in enumerate(self.choices) if self._key(c) == self._key(choice)), None)
        return [] if at is None else [*self.choices[max(0, at - _NEAR) : at], *self.choices[at + 1 : at + 1 + _NEAR]]

    def _own(self, base: Ladder, choice: CodedChoice) -> Choice:
        """The choice in numbers that one stands for."""
        same = (c for c in base.every if _kind(c) == _kind(choice))
        # One that refinement of another has left behind stands for itself.
        return next(same, Choice(choice.parameters, choice.error, choice.matrix))

    @staticmethod
    def _key(choice: Choice) -> tuple[_Kind, int]:
        return _kind(choice), choice.bits if isinstance(choice, CodedChoice) else WIDEST

    def _as(self, choice: Choice, bits: int) -> CodedChoice:
        """A choice in so many bits, rounded or expected."""
        known = self.known.get((_kind(choice), bits))
        if known is not None:
            return known
        error = choice.error
        if bits in INTEGER_BITS:
            error += self._feedback(bits) * self.search.lost(choice) * _LOST[bits] / _LOST[_TRIED]
        return CodedChoice(choice.parameters, error, choice.matrix, self.search.bytes_of(choice, bits), {}, bits)

    def _feedback(self, bits: int) -> float:
        """What feedback leaves of the trial's loss, by those that were rounded: those of as many bits, if there are."""
        return self._feedbacks.get(bits, self._feedbacks.get(0, _FEEDBACK))

    @cached_property
    def _feedbacks(self) -> dict[int, float]:
        ratios: dict[int, list[float]] = {}
        by_kind = {_kind(c): c for c in self.base.every}
        for (kind, bits), choice in self.known.items():
            if bits in INTEGER_BITS and kind in by_kind:
                own = by_kind[kind]
                ratio = (choice.error - own.error) / (self.search.lost(own) * _LOST[bits] / _LOST[_TRIED])
                for key in (bits, 0):
                    ratios.setdefault(key, []).append(log(min(3.0, max(1e-2, ratio))))
        return {bits: exp(sum(logs) / len(logs)) for bits, logs in ratios.items()}

"""What a form is to the rest: how matrices are found in it, how one is built of a file, which tensors it stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from htcompress.matrix.blocks import Blocks
from htcompress.matrix.layout import Layout
from htcompress.matrix.metric import Metric
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.storage import Codec, codec_within
from htcompress.vocabulary import WIDEST, LayoutKind


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix: the numbers it takes and the squared error it makes in the metric."""

    parameters: int
    error: float
    matrix: StoredMatrix | None
    """None: kept dense."""

    bytes: int | None = None
    """What it takes as it is stored, where that is what counts; None: its numbers are."""

    codecs: Mapping[str, tuple[Codec, Tensor | None]] = field(default_factory=dict)
    """How its cores are stored, by name, and the scales that are kept of each; the matrix is what will be decoded."""

    @property
    def size(self) -> int:
        """What a goal counts."""
        return self.parameters if self.bytes is None else self.bytes

    @property
    def is_dense(self) -> bool:
        """Whether the matrix is kept as it is."""
        return self.matrix is None

    @property
    def folds(self) -> bool:
        """Whether it is folded: neither the dense matrix, nor a truncated SVD."""
        return self.matrix is not None and self.matrix.folds


@dataclass(frozen=True)
class Columns:
    """What the columns of a matrix are: `size` inputs, then `extra` columns of other kinds."""

    size: int
    extra: int = 0


@dataclass(frozen=True, eq=False)
class Problem:
    """A matrix to be stored in fewer numbers, and what a search may use.

    Attributes:
        matrix: (rows, cols), the trained weights.
        metric: what an error counts.
        max_parameters: no more than this will be asked for.
        gates: the blocks in the rows, so that the gate axis can be a mode of its own.
        columns: how the columns are made up.
        layout: the family of layouts to look at.
        like: the search of another matrix whose first columns are the same inputs.
        bits: in which numbers will be stored, at most.
        beside: layers and directions that are planned together, this one's among them.
    """

    matrix: Blocks
    metric: Metric
    max_parameters: int
    gates: int = 1
    columns: Columns | None = None
    layout: LayoutKind = LayoutKind.AUTO
    like: MatrixSearch | None = None
    bits: int = WIDEST
    beside: int = 1


class Ladder(ABC):
    """The choices for one matrix from the smallest to all of its numbers.

    Frozen: what refines one gives another ladder.
    """

    @property
    @abstractmethod
    def choices(self) -> Sequence[Choice]:
        """A Pareto front by ascending sizes, the dense matrix at its end."""

    @property
    def every(self) -> Sequence[Choice]:
        """These, and others that they beat as they are, but not by much: rounded they may stand otherwise."""
        return self.choices

    @abstractmethod
    def improved(self, choice: Choice) -> Ladder | None:
        """The ladder with one of its choices refined; None where that would gain nothing."""

    @abstractmethod
    def neighbours(self, choice: Choice) -> Sequence[Choice]:
        """The choices next to one of them."""


class Search(ABC):
    """The candidates for one matrix, and the best of them for any size."""

    target: WeightedMatrix

    @property
    def matrix(self) -> Blocks:
        """W."""
        return self.target.matrix

    @property
    def metric(self) -> Metric:
        """What an error counts."""
        return self.target.metric

    @property
    def total(self) -> float:
        """The squared error of a zero matrix: the scale of all errors."""
        return self.target.total

    @property
    @abstractmethod
    def in_numbers(self) -> MatrixSearch:
        """The search whose sizes are numbers: this one, or what it stands on."""

    @property
    @abstractmethod
    def dense(self) -> Choice:
        """The matrix as it is."""

    @property
    @abstractmethod
    def spectrum(self) -> Tensor | None:
        """The leading singular values in the metric; None where they were not found."""

    @property
    @abstractmethod
    def smallest(self) -> int:
        """The least size that any candidate has."""

    @abstractmethod
    def ladder(self) -> Ladder:
        """Choices for a rising series of sizes."""

    @abstractmethod
    def grown(self, choice: Choice, size: int) -> Choice | None:
        """The best of a choice's kind that is no larger than this, refined to the end; None where there is none."""

    def rounded(self, bits: int) -> Choice | None:
        """The dense matrix in so many bits a number; None where that is no candidate."""
        return None

    def polished(self, choice: Choice) -> Choice:
        """A choice that will be stored, made as good as it can be at its size."""
        return choice

    @abstractmethod
    def cheapest(self, rtol: float) -> Choice:
        """The least size whose relative error (in the metric) is at most `rtol`, measured as it is stored."""

    @abstractmethod
    def exact(self, choice: Choice) -> Choice:
        """The choice with its error as it is."""

    def let_go(self) -> None:  # noqa: B027 - most searches hold nothing large
        """Let go of what takes much memory, and is found again where it is asked for: answers stay what they are."""


class MatrixSearch(Search):
    """The candidates for one matrix in numbers, decomposed once."""

    def __init__(self, problem: Problem) -> None:
        self.target = WeightedMatrix.of(problem.matrix, problem.metric)
        self.gates = problem.gates
        self.columns = problem.columns or Columns(self.matrix.shape[1])
        self.max_parameters = min(problem.max_parameters, self.matrix.numel())
        self.bits = problem.bits

    @property
    def in_numbers(self) -> MatrixSearch:
        return self

    @property
    def dense(self) -> Choice:
        return Choice(self.matrix.numel(), 0.0, None)

    @abstractmethod
    def best(self, max_parameters: int, *, polish: bool = False) -> Choice | None:
        """The candidate of least error that stores at most so many numbers; None where none does.

        `polish` measures more candidates, and refines the best.
        """

    def grown(self, choice: Choice, size: int) -> Choice | None:
        return self.best(size, polish=True)

    def stored_error(self, choice: Choice) -> float:
        """The squared error of a choice as it will be stored: balanced, in float32 or in fewer bits."""
        if choice.matrix is None:
            return 0.0
        codec, stored = codec_within(self.bits, torch.float32), choice.matrix.balance()

        def decoded(core: Tensor) -> Tensor:
            narrow = core.float()
            return (codec.rounded(narrow) if codec.holds(narrow) else narrow).double()

        cores = [decoded(core) if isinstance(core, Tensor) else core for core in stored.cores]
        return self.target.error_of(stored.with_cores(cores))

    def exact(self, choice: Choice) -> Choice:
        """The choice with its error as it is."""
        return choice if choice.matrix is None else replace(choice, error=self.target.error_of(choice.matrix))


def front(choices: Iterable[Choice]) -> list[Choice]:
    """The choices that no other beats in both size and error, by ascending size."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.size, c.error)):
        if not kept or choice.error < kept[-1].error:
            kept.append(choice)
    return kept


class MisfitError(ValueError):
    """A saved structure is none, or too large; the message ends a sentence about its matrix."""


@dataclass(frozen=True)
class Form:
    """One form, to be registered in `htcompress.forms.FORMS`.

    Attributes:
        name: in files (`form` of `config.json`) and on the command line.
        zeros: the zero matrix of a saved structure, see `StoredMatrix.to_config`.
        shapes: of the stored cores by name, from a layout and ranks (at least 1 each); raises `MisfitError` where
            they do not fit each other.
        search: how matrices are found in it; None of what nobody asks for.
    """

    name: str
    search: Callable[[Problem], MatrixSearch] | None = None
    zeros: Callable[[dict[str, Any]], StoredMatrix] | None = None
    shapes: Callable[[Layout, Sequence[int]], dict[str, tuple[int, ...]]] | None = None

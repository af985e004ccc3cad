"""The ways to store one layer and direction, from few numbers to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from htcompress.forms.form import Choice, Columns, Ladder, MatrixSearch, Problem
from htcompress.forms.registry import searched
from htcompress.matrix import Metric
from htcompress.matrix.blocks import Block, Blocks
from htcompress.matrix.inputs import Inputs, gather
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.model.statistics import DirectionStatistics
from htcompress.nn.dense import DenseDirection
from htcompress.nn.gates import GateMatrices
from htcompress.nn.order import order_words
from htcompress.vocabulary import WIDEST, Format, LayoutKind, Scope


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix of a direction that may be factored: `joint`, `ih`, `hh` or `hr`."""

    name: str
    search: MatrixSearch
    weight: float
    """What a squared error of this matrix counts beside those of other directions."""


Ladders = dict[Part, Ladder]
"""The choices for each part, as far as they have been improved."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """A scope of a direction: the matrices that may be compressed, and the numbers that stay whatever happens.

    `words` are those of an order of units, which a direction needs as soon as one of its matrices is compressed.
    """

    scope: Scope
    parts: tuple[Part, ...]
    fixed: int
    words: int = 0

    @property
    def smallest(self) -> int:
        """The fewest numbers it can store."""
        return self.fixed + self.words + sum(min(p.search.smallest, p.search.dense.parameters) for p in self.parts)

    def parameters(self, choices: Sequence[Choice]) -> int:
        """The numbers of a choice for each part, at most: an order that turns out to be needless is not stored."""
        words = 0 if all(choice.is_dense for choice in choices) else self.words
        return self.fixed + words + sum(choice.parameters for choice in choices)


@dataclass(frozen=True, eq=False)
class Option:
    """One point of a direction's frontier: a recipe with a choice for each of its parts."""

    parameters: int
    error: float
    recipe: Recipe
    choices: tuple[Choice, ...]


@dataclass(frozen=True, eq=False)
class DirectionProblem:
    """A direction to be compressed: its dense weights, what was seen of it, what it counts for.

    `order`, where there is one, is that of the hidden units in its matrices; it takes `order_words` numbers.
    """

    dense: DenseDirection
    seen: DirectionStatistics | None
    max_parameters: int
    scope: Scope
    layout: LayoutKind
    format: Format = Format.HT
    order: Tensor | None = None
    bits: int = WIDEST

    @cached_property
    def _arranged(self) -> DenseDirection:
        """The weights with their units in order."""
        return self.dense if self.order is None else self.dense.arranged(self.order)

    @cached_property
    def _seen(self) -> DirectionStatistics | None:
        """What was seen, of units in order."""
        if self.seen is None or self.order is None:
            return self.seen
        rows, units = self._at(self.order)
        columns = torch.arange(self.seen.inputs.shape[1])
        if self.dense.hr is None:
            inputs = self.dense.ih.shape[1]
            columns[inputs : inputs + len(units)] = inputs + units
        return self.seen.reordered(rows=rows, columns=columns)

    def _at(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rows of all gates, and the units, are taken from for an order."""
        settings = self.dense.settings
        return torch.cat([order + gate * settings.hidden_size for gate in range(settings.gates)]), order

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The scopes that were asked for."""
        dense, words = self.dense, 0 if self.order is None else order_words(len(self.order))
        hr = [self._part("hr")] if dense.hr is not None else []
        found = []
        if self.scope in (Scope.AUTO, Scope.INTEGRATED):
            joint = self._part("joint")
            found.append(Recipe(Scope.INTEGRATED, (joint, *hr), 0, words))
            if dense.biases:
                apart = self._part("joint", biases_apart=True, like=joint)
                found.append(Recipe(Scope.INTEGRATED, (apart, *hr), dense.biases, words))
        if self.scope in (Scope.AUTO, Scope.SEPARATE):
            ih = self._part("ih", like=found[-1].parts[0] if found else None)
            found.append(Recipe(Scope.SEPARATE, (ih, self._part("hh"), *hr), dense.biases, words))
        if self.scope is Scope.INPUT:
            rest = dense.parameters - dense.ih.numel()
            found.append(Recipe(Scope.INPUT, (self._part("ih"),), rest, words))
        return found

    def _part(self, name: str, *, biases_apart: bool = False, like: Part | None = None) -> Part:
        matrix, metric = self._matrix(name, biases_apart=biases_apart), self._metric(name, biases_apart=biases_apart)
        settings, inputs = self.dense.settings, self.dense.ih.shape[1]
        columns = Columns(inputs, matrix.shape[1] - inputs) if name == "joint" else Columns(matrix.shape[1])
        gates = 1 if name == "hr" else settings.gates
        near = None if like is None else like.search
        problem = Problem(matrix, metric, self.max_parameters, gates, columns, self.layout, near, self.bits)
        search = searched(problem, self.format.value)
        return Part(name, search, self._weight(name, search))

    @cached_property
    def _blocks(self) -> dict[str, Block]:
        """The direction's matrices and biases, each once for all recipes."""
        dense = self._arranged
        named = {"ih": dense.ih, "hh": dense.hh, "hr": dense.hr, "bias": dense.bias_columns()}
        return {name: Block(tensor) for name, tensor in named.items() if tensor is not None}

    @cached_property
    def _inputs(self) -> Inputs | None:
        """What was seen to enter the direction: x, then h."""
        if self._seen is None:
            return None
        size = self.dense.ih.shape[1]
        return gather([self._seen.inputs[:, :size], self._seen.inputs[:, size:]])

    def _matrix(self, name: str, *, biases_apart: bool = False) -> Blocks:
        names = [name]
        if name == "joint":
            names = ["ih", "hh"] + ([] if biases_apart or not self.dense.biases else ["bias"])
        return Blocks([self._blocks[part] for part in names])

    def _metric(self, name: str, *, biases_apart: bool = False) -> Metric:
        rows, cols = self._matrix(name, biases_apart=biases_apart).shape
        if self._seen is None or self._inputs is None or name == "hr":
            return Metric(rows, cols)
        kinds = {"ih": (0,), "hh": (1,), "joint": (0, 1)}[name]
        # What a bias column reads is always 1; where the bias is apart, it takes up the mean error.
        columns = 0 if name != "joint" or biases_apart else self.dense.bias_columns().shape[1]
        centred = self.dense.bias is not None and columns == 0
        gradients = self._seen.gradients_hh if name == "hh" else self._seen.gradients_ih
        return Metric(rows, cols, gradients, self._inputs.select(*kinds, constants=columns, centred=centred))

    def _weight(self, name: str, search: MatrixSearch) -> float:
        if self.seen is not None and name != "hr":
            return 1.0
        norms = [self.dense.ih, self.dense.hh] + ([] if self.dense.hr is None else [self.dense.hr])
        scale = sum(float(w.double().square().sum()) for w in norms)
        if self.seen is None or scale == 0:
            return 1.0 / scale if scale else 1.0
        # A projection has no statistics: its relative error counts like that of the matrix before it.
        reference = WeightedMatrix(self._matrix("hh"), self._metric("hh"))
        return reference.total / max(search.target.total, 1e-300)

    def ladders(self) -> Ladders:
        """The choices for every part as they stand before any is improved."""
        return {part: part.search.ladder() for recipe in self.recipes for part in recipe.parts}

    def frontier(self, ladders: Ladders) -> list[Option]:
        """The direction's options that no other beats in both numbers and error, by ascending numbers."""
        options = []
        for recipe in self.recipes:
            partial: list[tuple[int, float, tuple[Choice, ...]]] = [(recipe.fixed + recipe.words, 0.0, ())]
            for part in recipe.parts:
                partial = _front(
                    [
                        (p + c.parameters, e + part.weight * c.error, (*chosen, c))
                        for p, e, chosen in partial
                        for c in ladders[part].choices
                    ]
                )
            options += [Option(p, e, recipe, chosen) for p, e, chosen in partial]
        ordered = sorted(options, key=lambda o: (o.parameters, o.error))
        kept: list[Option] = []
        for option in ordered:
            if not kept or option.error < kept[-1].error:
                kept.append(option)
        return kept

    def matrices(self, recipe: Recipe, choices: Sequence[Choice]) -> GateMatrices:
        """What will be stored: the chosen matrices, and the biases with the mean error moved into them."""
        made = self._gate_matrices(recipe, choices)
        if self.order is None:
            return made
        rows_at, units_at = self._at(torch.argsort(self.order))
        bias, bias_hn = _taken(made.bias, rows_at), _taken(made.bias_hn, units_at)
        named: dict[str, StoredMatrix | None] = {name: getattr(made, name) for name in ("joint", "ih", "hh", "hr")}
        if any(matrix is not None and matrix.folds for matrix in named.values()):
            return replace(made, bias=bias, bias_hn=bias_hn, order=self.order)
        # Nothing is folded: the units may as well stand in their own order, which costs nothing.
        inputs, units = torch.arange(self.dense.ih.shape[1]), units_at
        states = units if self.dense.hr is None else torch.arange(self.dense.hh.shape[1])
        biases = torch.arange(self.dense.bias_columns().shape[1])
        joint = torch.cat([inputs, len(inputs) + states, len(inputs) + len(states) + biases])
        columns = {"joint": joint, "ih": inputs, "hh": states, "hr": units}

        def own(name: str) -> StoredMatrix | None:
            matrix = named[name]
            if matrix is None:
                return None
            # Biases may stand apart.
            return matrix.reordered(None if name == "hr" else rows_at, columns[name][: matrix.shape[1]])

        return GateMatrices(own("ih"), own("hh"), own("joint"), bias, bias_hn, own("hr"))

    def _gate_matrices(self, recipe: Recipe, choices: Sequence[Choice]) -> GateMatrices:
        dense = self._arranged
        kept = dense.matrices()
        named: dict[str, StoredMatrix | None] = {"ih": kept.ih, "hh": kept.hh, "hr": kept.hr}
        for part, choice in zip(recipe.parts, choices, strict=True):
            if choice.matrix is not None:
                named[part.name] = choice.matrix
        bias, bias_hn = dense.bias, dense.bias_hn
        joint = named.pop("joint", None)
        if joint is not None:
            part = recipe.parts[0]
            if part.search.target.matrix.shape[1] > dense.ih.shape[1] + dense.hh.shape[1]:
                return GateMatrices(joint=joint, hr=named["hr"])
            if part.search.target.metric.mean is not None:
                change = self._correction(part.search, joint, dense.ih.shape[1])
                bias, bias_hn = _add(bias, change[0]), _add(bias_hn, change[1])
            return GateMatrices(joint=joint, bias=bias, bias_hn=bias_hn, hr=named["hr"])
        for part, choice in zip(recipe.parts, choices, strict=True):
            if choice.matrix is not None and part.name in ("ih", "hh") and part.search.target.metric.mean is not None:
                inputs = dense.ih.shape[1] if part.name == "ih" else 0
                change = self._correction(part.search, choice.matrix, inputs)
                bias, bias_hn = _add(bias, change[0]), _add(bias_hn, change[1])
        return GateMatrices(ih=named["ih"], hh=named["hh"], bias=bias, bias_hn=bias_hn, hr=named["hr"])

    def _correction(self, search: MatrixSearch, stand_in: StoredMatrix, inputs: int) -> tuple[Tensor, Tensor | None]:
        """(W - W') mu, for the bias; for a GRU the candidate's hidden part apart."""
        mean = search.target.metric.mean
        if mean is None:
            raise RuntimeError("Only inputs that are centred have a mean error to be moved into the bias.")
        # The means of x and of h as two columns.
        parted = torch.stack([mean, mean], dim=1)
        parted[inputs:, 0], parted[:inputs, 1] = 0, 0
        from_x, from_h = (search.target.matrix.times(parted) - stand_in.times(parted)).unbind(1)
        if not self.dense.settings.recurrence.keeps_candidate_bias:
            return from_x + from_h, None
        keep = (self.dense.settings.gates - 1) * self.dense.settings.hidden_size
        return torch.cat([from_x[:keep] + from_h[:keep], from_x[keep:]]), from_h[keep:]


def _taken(values: Tensor | None, at: Tensor | None) -> Tensor | None:
    return values if values is None or at is None else values[at]


def _add(bias: Tensor | None, change: Tensor | None) -> Tensor | None:
    return bias if bias is None or change is None else (bias.double() + change).to(bias.dtype)


def _front(
    points: list[tuple[int, float, tuple[Choice, ...]]],
) -> list[tuple[int, float, tuple[Choice, ...]]]:
    kept: list[tuple[int, float, tuple[Choice, ...]]] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept

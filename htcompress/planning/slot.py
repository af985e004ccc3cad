"""The ways to store one layer and direction, from few numbers to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from htcompress.matrix import HTMatrix, LayoutKind, Metric
from htcompress.matrix.search import Choice, Columns, Search
from htcompress.nn.dense import DenseSlot
from htcompress.nn.settings import Kind
from htcompress.nn.weights import GateMatrices
from htcompress.planning.goal import Scope
from htcompress.statistics.collect import SlotStatistics


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix of a slot that may be put into HT form: `joint`, `ih`, `hh` or `hr`."""

    name: str
    search: Search
    weight: float
    """What a squared error of this matrix counts beside those of other slots."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """A scope of a slot: the matrices that may be compressed, and the numbers that stay whatever happens."""

    scope: Scope
    parts: tuple[Part, ...]
    fixed: int

    @property
    def smallest(self) -> int:
        """The fewest numbers it can store."""
        return self.fixed + sum(min(p.search.smallest, p.search.dense.parameters) for p in self.parts)


@dataclass(frozen=True, eq=False)
class Option:
    """One point of a slot's frontier: a recipe with a choice for each of its parts."""

    parameters: int
    error: float
    recipe: Recipe
    choices: tuple[Choice, ...]


@dataclass(frozen=True, eq=False)
class SlotTarget:
    """A slot to be compressed: its dense weights, what was seen of it, what it counts for.

    `scale` divides all squared errors where there are no statistics, so that every slot counts alike.
    """

    dense: DenseSlot
    seen: SlotStatistics | None
    max_parameters: int
    scope: Scope
    layout: LayoutKind

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The scopes that were asked for."""
        dense = self.dense
        hr = [self._part("hr")] if dense.hr is not None else []
        found = []
        if self.scope in (Scope.AUTO, Scope.INTEGRATED):
            found.append(Recipe(Scope.INTEGRATED, (self._part("joint"), *hr), 0))
            if dense.biases:
                apart = self._part("joint", biases_apart=True)
                found.append(Recipe(Scope.INTEGRATED, (apart, *hr), dense.biases))
        if self.scope in (Scope.AUTO, Scope.SEPARATE):
            found.append(Recipe(Scope.SEPARATE, (self._part("ih"), self._part("hh"), *hr), dense.biases))
        if self.scope is Scope.INPUT:
            rest = dense.parameters - dense.ih.numel()
            found.append(Recipe(Scope.INPUT, (self._part("ih"),), rest))
        return found

    def _part(self, name: str, *, biases_apart: bool = False) -> Part:
        matrix = self._matrix(name, with_biases=not biases_apart)
        metric = self._metric(name, matrix, biases_apart=biases_apart)
        settings, inputs = self.dense.settings, self.dense.ih.shape[1]
        columns = Columns(inputs, matrix.shape[1] - inputs) if name == "joint" else Columns(matrix.shape[1])
        search = Search(
            matrix,
            metric,
            max_parameters=self.max_parameters,
            gates=1 if name == "hr" else settings.kind.gates,
            columns=columns,
            kind=self.layout,
        )
        return Part(name, search, self._weight(name, search))

    def _matrix(self, name: str, *, with_biases: bool) -> Tensor:
        if name == "joint":
            return self.dense.joint(with_biases=with_biases)
        matrix = getattr(self.dense, name)
        assert isinstance(matrix, Tensor)
        return matrix

    def _metric(self, name: str, matrix: Tensor, *, biases_apart: bool) -> Metric:
        if self.seen is None or name == "hr":
            return Metric(*matrix.shape)
        rows, cols = matrix.shape
        inputs, size = self.seen.inputs, self.dense.ih.shape[1]
        gradients = self.seen.gradients_hh if name == "hh" else self.seen.gradients_ih
        if name == "ih":
            inputs = inputs[:, :size]
        elif name == "hh":
            inputs = inputs[:, size:]
        elif not biases_apart:
            ones = inputs.new_ones(len(inputs), self.dense.bias_columns().shape[1])
            return Metric(rows, cols, gradients=gradients, inputs=torch.cat([inputs, ones], dim=1))
        if self.dense.bias is None:
            return Metric(rows, cols, gradients=gradients, inputs=inputs)
        mean = inputs.mean(0)
        return Metric(rows, cols, gradients=gradients, inputs=inputs - mean, mean=mean)

    def _weight(self, name: str, search: Search) -> float:
        if self.seen is not None and name != "hr":
            return 1.0
        norms = [self.dense.ih, self.dense.hh] + ([] if self.dense.hr is None else [self.dense.hr])
        scale = sum(float(w.double().square().sum()) for w in norms)
        if self.seen is None or scale == 0:
            return 1.0 / scale if scale else 1.0
        # A projection has no statistics: its relative error counts like that of the matrix before it.
        reference = self._metric("hh", self.dense.hh, biases_apart=True).squared(self.dense.hh)
        return reference / max(search.total, 1e-300)

    def frontier(self) -> list[Option]:
        """The slot's options that no other beats in both numbers and error, by ascending numbers."""
        options = []
        for recipe in self.recipes:
            partial: list[tuple[int, float, tuple[Choice, ...]]] = [(recipe.fixed, 0.0, ())]
            for part in recipe.parts:
                ladder = part.search.ladder()
                partial = _front(
                    [
                        (p + c.parameters, e + part.weight * c.error, (*chosen, c))
                        for p, e, chosen in partial
                        for c in ladder
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
        dense = self.dense
        named: dict[str, HTMatrix | Tensor | None] = {"ih": dense.ih, "hh": dense.hh, "hr": dense.hr}
        for part, choice in zip(recipe.parts, choices, strict=True):
            named[part.name] = choice.matrix if choice.matrix is not None else part.search.matrix
        bias, bias_hn = dense.bias, dense.bias_hn
        joint = named.pop("joint", None)
        if isinstance(joint, HTMatrix):
            part = recipe.parts[0]
            if part.search.matrix.shape[1] > dense.ih.shape[1] + dense.hh.shape[1]:
                return GateMatrices(joint=joint, hr=named["hr"])
            bias, bias_hn = self._corrected(part.search, joint.dense(), dense.ih.shape[1])
            return GateMatrices(joint=joint, bias=bias, bias_hn=bias_hn, hr=named["hr"])
        for part, choice in zip(recipe.parts, choices, strict=True):
            if choice.matrix is not None and part.name in ("ih", "hh") and part.search.metric.mean is not None:
                inputs = dense.ih.shape[1] if part.name == "ih" else 0
                change = self._correction(part.search, choice.matrix.dense(), inputs)
                bias, bias_hn = _add(bias, change[0]), _add(bias_hn, change[1])
        return GateMatrices(ih=named["ih"], hh=named["hh"], bias=bias, bias_hn=bias_hn, hr=named["hr"])

    def _corrected(self, search: Search, stand_in: Tensor, inputs: int) -> tuple[Tensor | None, Tensor | None]:
        if search.metric.mean is None:
            return self.dense.bias, self.dense.bias_hn
        change = self._correction(search, stand_in, inputs)
        return _add(self.dense.bias, change[0]), _add(self.dense.bias_hn, change[1])

    def _correction(self, search: Search, stand_in: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
        """(W - W') mu, for the bias; for a GRU the candidate's hidden part apart."""
        assert search.metric.mean is not None
        lost = search.matrix.double() - stand_in.double()
        mean = search.metric.mean.double()
        from_x, from_h = lost[:, :inputs] @ mean[:inputs], lost[:, inputs:] @ mean[inputs:]
        if self.dense.settings.kind is not Kind.GRU:
            return from_x + from_h, None
        keep = 2 * self.dense.settings.hidden_size
        return torch.cat([from_x[:keep] + from_h[:keep], from_x[keep:]]), from_h[keep:]


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

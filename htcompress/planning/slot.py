"""The ways to store one layer and direction, from few numbers to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from htcompress.formats import Format
from htcompress.formats.search import NetworkSearch
from htcompress.matrix import LayoutKind, Metric
from htcompress.matrix.blocks import Block, Blocks
from htcompress.matrix.factored import Factored
from htcompress.matrix.inputs import Inputs, gather
from htcompress.matrix.search import Choice, Columns, Search
from htcompress.matrix.target import Target
from htcompress.nn.dense import DenseSlot
from htcompress.nn.settings import Kind
from htcompress.nn.weights import GateMatrices
from htcompress.planning.goal import Scope
from htcompress.statistics.collect import SlotStatistics


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix of a slot that may be factored: `joint`, `ih`, `hh` or `hr`."""

    name: str
    search: Search | NetworkSearch
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
    format: Format = Format.HT

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The scopes that were asked for."""
        dense = self.dense
        hr = [self._part("hr")] if dense.hr is not None else []
        found = []
        if self.scope in (Scope.AUTO, Scope.INTEGRATED):
            joint = self._part("joint")
            found.append(Recipe(Scope.INTEGRATED, (joint, *hr), 0))
            if dense.biases:
                apart = self._part("joint", biases_apart=True, like=joint)
                found.append(Recipe(Scope.INTEGRATED, (apart, *hr), dense.biases))
        if self.scope in (Scope.AUTO, Scope.SEPARATE):
            ih = self._part("ih", like=found[-1].parts[0] if found else None)
            found.append(Recipe(Scope.SEPARATE, (ih, self._part("hh"), *hr), dense.biases))
        if self.scope is Scope.INPUT:
            rest = dense.parameters - dense.ih.numel()
            found.append(Recipe(Scope.INPUT, (self._part("ih"),), rest))
        return found

    def _part(self, name: str, *, biases_apart: bool = False, like: Part | None = None) -> Part:
        matrix, metric = self._matrix(name, biases_apart=biases_apart), self._metric(name, biases_apart=biases_apart)
        settings, inputs = self.dense.settings, self.dense.ih.shape[1]
        columns = Columns(inputs, matrix.shape[1] - inputs) if name == "joint" else Columns(matrix.shape[1])
        gates = 1 if name == "hr" else settings.kind.gates
        search: Search | NetworkSearch
        if self.format in (Format.HT, Format.SVD):
            search = Search(
                matrix,
                metric,
                max_parameters=self.max_parameters,
                gates=gates,
                columns=columns,
                kind=LayoutKind.SVD if self.format is Format.SVD else self.layout,
                like=None if like is None or not isinstance(like.search, Search) else like.search,
            )
        else:
            search = NetworkSearch(
                matrix, metric, form=self.format, max_parameters=self.max_parameters, gates=gates, columns=columns
            )
        return Part(name, search, self._weight(name, search))

    @cached_property
    def _blocks(self) -> dict[str, Block]:
        """The slot's matrices and biases, each once for all recipes."""
        dense = self.dense
        named = {"ih": dense.ih, "hh": dense.hh, "hr": dense.hr, "bias": dense.bias_columns()}
        return {name: Block(tensor) for name, tensor in named.items() if tensor is not None}

    @cached_property
    def _inputs(self) -> Inputs | None:
        """What was seen to enter the slot: x, then h."""
        if self.seen is None:
            return None
        size = self.dense.ih.shape[1]
        return gather([self.seen.inputs[:, :size], self.seen.inputs[:, size:]])

    def _matrix(self, name: str, *, biases_apart: bool = False) -> Blocks:
        names = [name]
        if name == "joint":
            names = ["ih", "hh"] + ([] if biases_apart or not self.dense.biases else ["bias"])
        return Blocks([self._blocks[part] for part in names])

    def _metric(self, name: str, *, biases_apart: bool = False) -> Metric:
        rows, cols = self._matrix(name, biases_apart=biases_apart).shape
        if self.seen is None or self._inputs is None or name == "hr":
            return Metric(rows, cols)
        kinds = {"ih": (0,), "hh": (1,), "joint": (0, 1)}[name]
        # What a bias column reads is always 1; where the bias is apart, it takes up the mean error.
        columns = 0 if name != "joint" or biases_apart else self.dense.bias_columns().shape[1]
        centred = self.dense.bias is not None and columns == 0
        gradients = self.seen.gradients_hh if name == "hh" else self.seen.gradients_ih
        return Metric(rows, cols, gradients, self._inputs.select(*kinds, constants=columns, centred=centred))

    def _weight(self, name: str, search: Search | NetworkSearch) -> float:
        if self.seen is not None and name != "hr":
            return 1.0
        norms = [self.dense.ih, self.dense.hh] + ([] if self.dense.hr is None else [self.dense.hr])
        scale = sum(float(w.double().square().sum()) for w in norms)
        if self.seen is None or scale == 0:
            return 1.0 / scale if scale else 1.0
        # A projection has no statistics: its relative error counts like that of the matrix before it.
        reference = Target(self._matrix("hh"), self._metric("hh"))
        return reference.total / max(search.total, 1e-300)

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
        named: dict[str, Factored | Tensor | None] = {"ih": dense.ih, "hh": dense.hh, "hr": dense.hr}
        for part, choice in zip(recipe.parts, choices, strict=True):
            if choice.matrix is not None:
                named[part.name] = choice.matrix
        bias, bias_hn = dense.bias, dense.bias_hn
        joint = named.pop("joint", None)
        if joint is not None and not isinstance(joint, Tensor):
            part = recipe.parts[0]
            if part.search.matrix.shape[1] > dense.ih.shape[1] + dense.hh.shape[1]:
                return GateMatrices(joint=joint, hr=named["hr"])
            if part.search.metric.mean is not None:
                change = self._correction(part.search, joint, dense.ih.shape[1])
                bias, bias_hn = _add(bias, change[0]), _add(bias_hn, change[1])
            return GateMatrices(joint=joint, bias=bias, bias_hn=bias_hn, hr=named["hr"])
        for part, choice in zip(recipe.parts, choices, strict=True):
            if choice.matrix is not None and part.name in ("ih", "hh") and part.search.metric.mean is not None:
                inputs = dense.ih.shape[1] if part.name == "ih" else 0
                change = self._correction(part.search, choice.matrix, inputs)
                bias, bias_hn = _add(bias, change[0]), _add(bias_hn, change[1])
        return GateMatrices(ih=named["ih"], hh=named["hh"], bias=bias, bias_hn=bias_hn, hr=named["hr"])

    def _correction(
        self, search: Search | NetworkSearch, stand_in: Factored, inputs: int
    ) -> tuple[Tensor, Tensor | None]:
        """(W - W') mu, for the bias; for a GRU the candidate's hidden part apart."""
        assert search.metric.mean is not None
        mean = search.metric.mean
        # The means of x and of h as two columns.
        parted = torch.stack([mean, mean], dim=1)
        parted[inputs:, 0], parted[:inputs, 1] = 0, 0
        from_x, from_h = (search.matrix.times(parted) - stand_in.times(parted)).unbind(1)
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

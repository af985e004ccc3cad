"""The ways to store one layer and direction, from few numbers to all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from htcompress.forms import DenseMatrix
from htcompress.forms.coded import CodedSearch
from htcompress.forms.form import Choice, Columns, Ladder, Problem, Search
from htcompress.forms.registry import searched
from htcompress.matrix import Metric
from htcompress.matrix.blocks import DOUBLED, Block, Blocks
from htcompress.matrix.inputs import Inputs, gather
from htcompress.matrix.stored import StoredMatrix
from htcompress.matrix.weighted import WeightedMatrix
from htcompress.model.statistics import DirectionStatistics
from htcompress.nn.dense import DenseDirection
from htcompress.nn.gates import LARGEST_BIAS, NARROWEST_BIAS, GateMatrices
from htcompress.nn.order import order_words, words_of
from htcompress.planning.knapsack import combined
from htcompress.planning.unit import NUMBERS, Unit
from htcompress.side_by_side import cached_property
from htcompress.storage import Codec, codec_within
from htcompress.storage.registry import PLAIN
from htcompress.vocabulary import WIDEST, Format, LayoutKind, Scope

_BIASES_COUNT = 64
"""Of a budget that is as many times the biases of a direction they are no part worth saving: they stand apart."""

_MOST_OF_DENSE = 0.9
"""The part of a matrix's numbers that a form of it has at most where bytes count: there rounding all pays sooner."""


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix of a direction that may be factored: `joint`, `ih`, `hh` or `hr`."""

    name: str
    search: Search
    weight: float
    """What a squared error of this matrix counts beside those of other directions."""


Ladders = dict[Part, Ladder]
"""The choices for each part, as far as they have been improved."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """A scope of a direction: the matrices that may be compressed, and the size of what stays whatever happens.

    Sizes are numbers, or bytes where those count. `words` is that of an order of units, which a direction needs as
    soon as one of its matrices is folded, `exponents` that of the inputs' exponents, wherever one is not as it is.
    """

    scope: Scope
    parts: tuple[Part, ...]
    fixed: int
    words: int = 0
    exponents: int = 0

    @property
    def smallest(self) -> int:
        """The least size it can have."""
        return self.most_beside + sum(min(p.search.smallest, p.search.dense.size) for p in self.parts)

    @property
    def most_beside(self) -> int:
        """The most that is stored beside the choices."""
        return self.fixed + self.words + self.exponents

    def size(self, choices: Sequence[Choice]) -> int:
        """The size of a choice for each part, at most: an order that turns out to be needless is not stored."""
        words = 0 if all(choice.matrix is None or choice.matrix.is_dense for choice in choices) else self.words
        as_it_is = all(c.is_dense and c.size == p.search.dense.size for c, p in zip(choices, self.parts, strict=True))
        return self.fixed + words + (0 if as_it_is else self.exponents) + sum(choice.size for choice in choices)


@dataclass(frozen=True, eq=False)
class Option:
    """One point of a direction's frontier: a recipe with a choice for each of its parts."""

    size: int
    error: float
    recipe: Recipe
    choices: tuple[Choice, ...]


@dataclass(frozen=True, eq=False)
class DirectionProblem:
    """A direction to be compressed: its dense weights, what was seen of it, what it counts for.

    `order`, where there is one, is that of the hidden units in its matrices; it takes `order_words` numbers. With
    `exponents` of the inputs the matrix that reads these reads each times two to the power of its own. `beside`
    directions are planned together.
    """

    dense: DenseDirection
    seen: DirectionStatistics | None
    max_size: int
    scope: Scope
    layout: LayoutKind
    format: Format = Format.HT
    order: Tensor | None = None
    unit: Unit = NUMBERS
    exponents: Tensor | None = None
    beside: int = 1

    @cached_property
    def _arranged(self) -> DenseDirection:
        """The weights with their units in order, but for a W_ih that is too large, and their inputs of one scale."""
        dense = self.dense if self.order is None else self.dense.arranged(self.order, all_but_ih=self._ih_stays)
        return dense if self.exponents is None else replace(dense, ih=torch.ldexp(dense.ih, -self.exponents))

    @property
    def _ih_stays(self) -> bool:
        """Whether W_ih is in the order of the units as a block only, and lies in its own."""
        return self.order is not None and self.dense.ih.numel() > DOUBLED

    @cached_property
    def _seen(self) -> DirectionStatistics | None:
        """What was seen, of units in order."""
        if self.seen is None or self.order is None:
            return self.seen
        # The inputs, which may be large, are put in order where they are parted.
        return self.seen.reordered(rows=self._at(self.order)[0])

    def _at(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rows of all gates, and the units, are taken from for an order."""
        settings = self.dense.settings
        return torch.cat([order + gate * settings.hidden_size for gate in range(settings.gates)]), order

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The scopes that were asked for."""
        dense, words = self.dense, 0 if self.order is None else self.unit.of_words(order_words(len(self.order)))
        # Where numbers count and are codes, no matrix stays as it is.
        always, exponents = (self._exponents, 0) if self.unit.codes else (0, self._exponents)
        beside = words, exponents
        biases = self.unit.of(dense.biases, self._bias_bits)
        hr = [self._part("hr")] if dense.hr is not None else []
        found = []
        whole = self.format is Format.DENSE and self.scope is not Scope.INPUT
        if self.scope in (Scope.AUTO, Scope.INTEGRATED) and not whole:
            within: Part | None = None
            if biases * _BIASES_COUNT > self.max_size or not dense.biases:
                within = self._part("joint")
                found.append(Recipe(Scope.INTEGRATED, (within, *hr), always, *beside))
            if dense.biases:
                apart = self._part("joint", biases_apart=True, like=within)
                found.append(Recipe(Scope.INTEGRATED, (apart, *hr), biases + always, *beside))
        if self.scope in (Scope.AUTO, Scope.SEPARATE) or whole:
            ih = self._part("ih", like=found[-1].parts[0] if found else None)
            found.append(Recipe(Scope.SEPARATE, (ih, self._part("hh"), *hr), biases + always, *beside))
        if self.scope is Scope.INPUT:
            rest = self.unit.of(dense.parameters - dense.ih.numel() - dense.biases) + biases
            found.append(Recipe(Scope.INPUT, (self._part("ih"),), rest + always, *beside))
        return found

    def _part(self, name: str, *, biases_apart: bool = False, like: Part | None = None) -> Part:
        matrix, metric = self._matrix(name, biases_apart=biases_apart), self._metric(name, biases_apart=biases_apart)
        settings, inputs = self.dense.settings, self.dense.ih.shape[1]
        columns = Columns(inputs, matrix.shape[1] - inputs) if name == "joint" else Columns(matrix.shape[1])
        gates = 1 if name == "hr" else settings.gates
        near = None if like is None else like.search.in_numbers
        most, bits = self.unit.numbers(self.max_size), max(self.unit.bits)
        if self.unit.width is not None:
            most = max(1, min(most, int(_MOST_OF_DENSE * matrix.numel())))
        problem = Problem(matrix, metric, most, gates, columns, self.layout, near, bits, self.beside)
        search: Search = (base := searched(problem, self.format.value))
        if self.unit.width is not None:
            dense, width = name != "joint", self.unit.width
            search = CodedSearch(base, self.unit.bits, width=width, dense=dense, most=self.max_size)
        return Part(name, search, self._weight(name, search))

    @cached_property
    def _bias_bits(self) -> int:
        """In how many bits biases are stored where bytes count: as they are where they stand against large inputs."""
        known = [bias for bias in (self.dense.bias, self.dense.bias_hn) if bias is not None]
        largest = max((float(bias.abs().max()) for bias in known), default=0.0)
        return NARROWEST_BIAS if largest <= LARGEST_BIAS else WIDEST

    @property
    def dense_size(self) -> int:
        """The size of the direction as it is."""
        return self.unit.of(self.dense.parameters) + (self._exponents if self.unit.codes else 0)

    @property
    def _exponents(self) -> int:
        return 0 if self.exponents is None else self.unit.of_words(words_of(len(self.exponents)))

    @cached_property
    def _blocks(self) -> dict[str, Block]:
        """The direction's matrices and biases, each once for all recipes."""
        dense = self._arranged
        named = {"ih": dense.ih, "hh": dense.hh, "hr": dense.hr, "bias": dense.bias_columns()}
        rows = self._at(self.order)[0] if self.order is not None and self._ih_stays else None
        orders = {"ih": rows}
        return {name: Block(tensor, orders.get(name)) for name, tensor in named.items() if tensor is not None}

    @cached_property
    def _inputs(self) -> Inputs | None:
        """What was seen to enter the direction: x, then h."""
        if self._seen is None:
            return None
        x, h = self._seen.inputs.split([self.dense.ih.shape[1], self.dense.hh.shape[1]], dim=1)
        x = x if self.exponents is None else torch.ldexp(x, self.exponents)
        return gather([x, h if self.order is None or self.dense.hr is not None else h[:, self.order]])

    def _matrix(self, name: str, *, biases_apart: bool = False) -> Blocks:
        whole = ["ih", "hh"] + ([] if biases_apart or not self.dense.biases else ["bias"])
        names = whole if name == "joint" else [name]
        return Blocks([self._blocks[part] for part in names])

    def _metric(self, name: str, *, biases_apart: bool = False) -> Metric:
        rows, cols = self._matrix(name, biases_apart=biases_apart).shape
        if self._seen is None or self._inputs is None or name == "hr":
            return Metric(rows, cols)
        kinds = {"ih": (0,), "hh": (1,), "joint": (0, 1)}[name]
        # What a bias column reads is always 1; where the bias is apart, it takes up the mean error.
        columns = 0 if name != "joint" or biases_apart else self.dense.bias_columns().shape[1]
        centred = self.dense.bias is not None and columns == 0
        gradients = self._seen.weights_hh if name == "hh" else self._seen.weights_ih
        inputs = self._inputs.select(*kinds, constants=columns, centred=centred)
        like = self._metrics.setdefault(id(gradients), Metric(rows, cols, gradients, inputs))
        return like.of_columns(cols, inputs)

    @cached_property
    def _metrics(self) -> dict[int, Metric]:
        """One for each moment of gradients, whose rows others have, too."""
        return {}

    def _weight(self, name: str, search: Search) -> float:
        if self.seen is not None and name != "hr":
            return 1.0
        norms = [self.dense.ih, self.dense.hh] + ([] if self.dense.hr is None else [self.dense.hr])
        scale = sum(float(c.square().sum()) for w in norms for _, c in Blocks.of(w).chunks())
        if self.seen is None or scale == 0:
            return 1.0 / scale if scale else 1.0
        # A projection has no statistics: its relative error counts like that of the matrix before it.
        reference = WeightedMatrix(self._matrix("hh"), self._metric("hh"))
        return reference.total / max(search.target.total, 1e-300)

    @property
    def parts(self) -> list[Part]:
        """All parts of its recipes, each once."""
        return list(dict.fromkeys(part for recipe in self.recipes for part in recipe.parts))

    def frontier(self, ladders: Ladders) -> list[Option]:
        """The direction's options that no other beats in both size and error, by ascending size."""
        options = []
        for recipe in self.recipes:
            choices = [ladders[part].choices for part in recipe.parts]
            found = combined(choices, sys.maxsize, [part.weight for part in recipe.parts])
            for size, error, taken in zip(found.sizes, found.errors, found.items.T, strict=True):
                chosen = tuple(group[at] for group, at in zip(choices, taken, strict=True))
                options.append(Option(int(size) + recipe.most_beside, float(error), recipe, chosen))
        ordered = sorted(options, key=lambda o: (o.size, o.error))
        kept: list[Option] = []
        for option in ordered:
            if not kept or option.error < kept[-1].error:
                kept.append(option)
        return kept

    def matrices(self, recipe: Recipe, choices: Sequence[Choice]) -> GateMatrices:
        """What will be stored: the chosen matrices, and the biases with the mean error moved into them."""
        made = self._with_exponents(self._gate_matrices(recipe, choices), recipe, choices)
        codecs = {
            f"{part.name}.{name}": how
            for part, choice in zip(recipe.parts, choices, strict=True)
            for name, how in choice.codecs.items()
        }
        if self.unit.width is not None and any(not choice.is_dense for choice in choices):
            for name in ("bias", "bias_hn"):
                bias = getattr(made, name)
                codec = codec_within(self._bias_bits, torch.float32 if self.unit.width > 2 else torch.float16)
                # What it is added to is of order one: how exact a small bias is relative to itself does not matter.
                if bias is not None and codec is not PLAIN and torch.isfinite(codec.rounded(bias)).all():
                    codecs[name] = codec, None
        made = replace(made, codecs=codecs)
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

        def own_scales(name: str, codec: Codec, scales: Tensor | None) -> tuple[Codec, Tensor | None]:
            # A dense matrix has a scale for each row, and the rows of a projection are no units.
            place = name.partition(".")[0]
            matrix = named.get(place)
            moves = scales is not None and matrix is not None and matrix.is_dense and place != "hr"
            return codec, scales[rows_at] if moves and scales is not None else scales

        codecs = {name: own_scales(name, *how) for name, how in codecs.items()}
        matrices: Any = {name: own(name) for name in named}
        return replace(made, **matrices, bias=bias, bias_hn=bias_hn, codecs=codecs)

    def _with_exponents(self, made: GateMatrices, recipe: Recipe, choices: Sequence[Choice]) -> GateMatrices:
        """Inputs read times their scales; a matrix that stays as it is reads them as they are."""
        if self.exponents is None:
            return made
        reads = next(choice for part, choice in zip(recipe.parts, choices, strict=True) if part.name in ("joint", "ih"))
        if made.ih is None or not made.ih.is_dense or reads.codecs:
            return replace(made, input_exponents=self.exponents)
        return replace(made, ih=DenseMatrix(torch.ldexp(made.ih.dense(), self.exponents)))

    def _gate_matrices(self, recipe: Recipe, choices: Sequence[Choice]) -> GateMatrices:
        dense = self._arranged
        pairs = zip(recipe.parts, choices, strict=True)
        if self._ih_stays and any(part.name == "ih" and choice.is_dense for part, choice in pairs):
            dense = replace(dense, ih=self._blocks["ih"].tensor)
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
            if part.name not in ("ih", "hh") or part.search.target.metric.mean is None:
                continue
            stored = self._stored(part, choice)
            if stored is not None:
                change = self._correction(part.search, stored, dense.ih.shape[1] if part.name == "ih" else 0)
                bias, bias_hn = _add(bias, change[0]), _add(bias_hn, change[1])
        return GateMatrices(ih=named["ih"], hh=named["hh"], bias=bias, bias_hn=bias_hn, hr=named["hr"])

    def _stored(self, part: Part, choice: Choice) -> StoredMatrix | None:
        """What is stored in place of a matrix; None where that is the matrix as it is."""
        codec = codec_within(WIDEST if self.unit.width is not None else max(self.unit.bits), torch.float32)
        if choice.matrix is not None or codec is PLAIN:
            return choice.matrix
        matrix, exponents = part.search.target.matrix.dense(), None if part.name == "hh" else self.exponents
        # A matrix that stays as it is reads its inputs as they are, and is rounded so.
        own = matrix if exponents is None else torch.ldexp(matrix, exponents)
        if not codec.holds(own):
            return None
        rounded = codec.rounded(own, codec.scales(own))
        return DenseMatrix(rounded if exponents is None else torch.ldexp(rounded, -exponents))

    def weight_error(self, part: Part, choice: Choice) -> float:
        """The plain relative error ||W - W'|| / ||W|| of a choice, of weights that read inputs as they are."""
        if choice.matrix is None:
            return 0.0
        target, scales = part.search.target, None
        if self.exponents is not None and part.name in ("joint", "ih"):
            scales = torch.ones(target.matrix.shape[1], dtype=torch.float64)
            scales[: len(self.exponents)] = torch.ldexp(scales[: len(self.exponents)], self.exponents)
        return target.weight_error_of(choice.matrix, scales)

    def _correction(self, search: Search, stand_in: StoredMatrix, inputs: int) -> tuple[Tensor, Tensor | None]:
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

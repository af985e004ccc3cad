"""The weights of one layer and direction as parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from htcompress.matrix.stored import StoredMatrix
from htcompress.nn.execution import Execution
from htcompress.nn.kernel_weights import TILED, KernelWeights
from htcompress.nn.order import decoded, encoded, order_words, words_of
from htcompress.nn.present import Remembered
from htcompress.nn.settings import RecurrentSettings
from htcompress.nn.tracing import is_tracing
from htcompress.nn.weights import Weight, weight_from_config
from htcompress.storage import Codec, codec_of, codec_within
from htcompress.storage.registry import PLAIN
from htcompress.values import in_full_precision

NARROWEST_BIAS = 16
"""Bits of a bias, at least."""

LARGEST_BIAS = 16.0
"""Up to which a bias is rounded to so few: it is added to what is of order one, where .004 is little. Larger ones stand
against the means of inputs, and what rounding takes of them nothing makes up for."""


@dataclass(frozen=True)
class GateMatrices:
    """The matrices of one layer and direction before they become parameters, each in a form of its own.

    Either `joint`, one matrix for [W_ih | W_hh | biases], or `ih` and `hh`. `bias` (rows) is the merged
    bias where it is not a column of `joint`; `bias_hn` (hidden) is what a GRU cannot merge; `hr` is an
    LSTM's projection. Where they are `shared`, dense matrices become parameters without being copied.

    With an `order` (hidden) the matrices have their units in it: row k of a gate is that of unit order[k], and so are
    the columns that read units. Biases that stand apart are in the units' own order.

    With `input_exponents` (inputs) `joint` or `ih` reads each input times two to the power of its exponent.

    `codecs` says how cores and biases are stored, by their names among the parameters (`ih.U0`, `bias`), and the scales
    that are kept of each; what is not named is stored as it is.
    """

    ih: StoredMatrix | None = None
    hh: StoredMatrix | None = None
    joint: StoredMatrix | None = None
    bias: Tensor | None = None
    bias_hn: Tensor | None = None
    hr: StoredMatrix | None = None
    shared: bool = False
    order: Tensor | None = None
    input_exponents: Tensor | None = None
    codecs: Mapping[str, tuple[Codec, Tensor | None]] = field(default_factory=dict)


class GateWeights(nn.Module):
    """The weights of one layer and direction: `GateMatrices` as parameters.

    `resolve` gives what a native kernel needs; where no gradient is recorded it is computed once and kept for as long
    as the parameters stay what they are. `order`, where there is one, holds the words of `htcompress.nn.order`,
    `input_exponents` a byte for each input.
    """

    ih: Weight | None
    hh: Weight | None
    joint: Weight | None
    hr: Weight | None
    bias: nn.Parameter | None
    bias_hn: nn.Parameter | None
    order: Tensor | None
    input_exponents: Tensor | None

    def __init__(self, settings: RecurrentSettings, layer: int, matrices: GateMatrices) -> None:
        super().__init__()
        self.settings = settings
        self.input_size = settings.layer_input(layer)
        for name in ("ih", "hh", "joint", "hr"):
            matrix = getattr(matrices, name)
            setattr(self, name, None if matrix is None else Weight(matrix, shared=matrices.shared))
        for name in ("bias", "bias_hn"):
            value = getattr(matrices, name)
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))
        self.register_buffer("order", None if matrices.order is None else encoded(matrices.order))
        exponents = matrices.input_exponents
        self.register_buffer("input_exponents", None if exponents is None else exponents.to(torch.int8))
        self.codecs: dict[str, Codec] = {}
        for name, (codec, scales) in matrices.codecs.items():
            self._store(name, codec, scales)
        self.frozen = False
        self._forget()

    def _forget(self) -> None:
        """Drop everything that was computed of parameters."""
        self._kept: dict[Execution, tuple[Remembered, KernelWeights]] = {}
        self._layout_of: dict[Execution, list[tuple[Weight, bool]]] = {}
        self._places: tuple[Tensor, Tensor] | None = None
        self._scales: Tensor | None = None

    def weights(self) -> dict[str, Weight]:
        """The matrices by name, in order."""
        named = {"joint": self.joint, "ih": self.ih, "hh": self.hh, "hr": self.hr}
        return {name: weight for name, weight in named.items() if weight is not None}

    @property
    def parameter_count(self) -> int:
        """The numbers stored, an order and exponents counted in words of 32 bits."""
        return sum(p.numel() for p in self.parameters()) + sum(map(words_of, self._beside))

    @property
    def bytes(self) -> int:
        """What they take as they are stored."""
        return self.bytes_of("") + sum(self._beside)

    @property
    def _beside(self) -> list[int]:
        """The bytes of what is stored besides parameters."""
        return [b.numel() * b.element_size() for b in (self.order, self.input_exponents) if b is not None]

    def bytes_of(self, prefix: str) -> int:
        """What the parameters take whose names begin so (`ih.`), as they are stored."""
        named = [(name, p) for name, p in self.named_parameters() if name.startswith(prefix)]
        return sum(self.codecs.get(name, PLAIN).bytes(tuple(p.shape), p.dtype) for name, p in named)

    def store_in(self, bits: int) -> None:
        """Let parameters of which nothing else is known be stored in at most so many bits, where it does no harm."""
        for name, parameter in self.named_parameters():
            if name in self.codecs:
                continue
            # Few numbers, and they are added as they are: biases are never narrower than half precision.
            own = bits if "." in name else max(bits, NARROWEST_BIAS)
            codec = codec_within(own, parameter.dtype)
            harmless = "." in name or float(parameter.detach().abs().max()) <= LARGEST_BIAS
            if codec is not PLAIN and harmless and codec.holds(parameter.detach()):
                self._store(name, codec, codec.scales(parameter))
        self.round()

    def _store(self, name: str, codec: Codec, scales: Tensor | None) -> None:
        """Let a parameter be stored through a codec. Its scales are a buffer beside it."""
        self.codecs[name] = codec
        if scales is not None:
            place, _, own = name.rpartition(".")
            self.get_submodule(place).register_buffer(f"{own}_scales", scales)

    def rounded(self, name: str, values: Tensor) -> Tensor:
        """What will be decoded of a parameter with these values."""
        _, codec, scales = self.stored(name)
        return codec.rounded(values, scales)

    def stored(self, name: str) -> tuple[Tensor, Codec, Tensor | None]:
        """A parameter, the codec that it is stored through, and the scales that are kept of it."""
        place, _, own = name.rpartition(".")
        module = self.get_submodule(place)
        return getattr(module, own), self.codecs.get(name, PLAIN), getattr(module, f"{own}_scales", None)

    def round(self) -> None:
        """Take for the parameters what will be decoded of them, in place."""
        for name, parameter in self.named_parameters():
            if name in self.codecs:
                parameter.data.copy_(self.rounded(name, parameter.data))

    def resolve(self, vectors: Any = 1) -> KernelWeights:
        """The kernel's weights for the present parameters, and so many input vectors at a time."""
        execution = self._execution(vectors)
        if torch.is_grad_enabled() or is_tracing():
            return self._resolve(execution)
        kept = self._kept.get(execution)
        if self.frozen and kept is not None:
            return kept[1]
        try:
            read, passed = self._sources(execution)
            if kept is not None and kept[0].holds(read, passed):
                return kept[1]
            weights = self._resolve(execution)
            if self.frozen:
                weights = weights.apart()
            if self.frozen or Remembered.can([*read, *passed]):
                self._kept[execution] = Remembered(read, passed), weights
            return weights
        except RuntimeError:  # tensors without memory of their own, as torch.func makes them
            return self._resolve(execution)

    def _sources(self, execution: Execution) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that `_resolve` computes with, and those that it only hands on."""
        read: list[Tensor] = []
        passed: list[Tensor] = []
        for weight, whole in self._stores(execution):
            parameters = [p for p in weight._parameters.values() if p is not None]
            (read if whole else passed).extend(parameters)
        factors = self.joint is not None and self.joint.stores_factors and self.input_exponents is None
        if factors and execution is Execution.PROJECT:
            # Of the columns only those of states and biases are computed with.
            rows, cols = passed[:2]
            read += [rows, cols[self.input_size :]]
        read += [bias for bias in (self.bias, self.bias_hn) if bias is not None]
        return read, passed

    def _settled(self, execution: Execution) -> bool:
        """Whether the recurrent matrix is looked at number by number; else a view of it is handed on."""
        weight = self.hh if self.joint is None else self.joint
        return any(own is weight and (whole or not weight.is_dense) for own, whole in self._stores(execution))

    def _stores(self, execution: Execution) -> list[tuple[Weight, bool]]:
        """The matrices, and whether something is computed of all their numbers."""
        if execution not in self._layout_of:
            found = []
            rows, state = self.settings.rows, self.settings.state_size
            for name, weight in self.weights().items():
                scaled = name in ("joint", "ih") and self.input_exponents is not None
                if weight.is_dense:
                    whole = self.order is not None or scaled or (name == "hh" and rows * state <= TILED)
                elif name in ("joint", "ih") and execution is Execution.PROJECT:
                    whole = not weight.stores_factors or scaled or (name == "ih" and self.order is not None)
                else:
                    whole = not (name == "ih" and execution is Execution.CONTRACT)
                found.append((weight, whole))
            self._layout_of[execution] = found
        return self._layout_of[execution]

    def freeze(self, frozen: bool = True) -> None:
        """Take the parameters for unchanging: what is computed of them is kept without looking at them again."""
        self._forget()
        self.frozen = frozen

    def written_out(self) -> KernelWeights:
        """The kernel's weights with the matrices written out, however inputs are read."""
        return self._resolve(Execution.MATERIALISE)

    def places(self) -> tuple[Tensor, Tensor] | None:
        """Where rows (gates * hidden) and units (hidden) stand in the stored matrices; None: in their own order."""
        if self.order is None:
            return None
        if self._places is None or self._places[0].device != self.order.device:
            size = self.settings.hidden_size
            with torch.inference_mode(False):
                at = torch.argsort(decoded(self.order.cpu(), size)).to(self.order.device)
                gates = torch.arange(self.settings.gates, device=at.device)[:, None]
                self._places = (gates * size + at).flatten(), at
        return self._places

    def input_scales(self) -> Tensor | None:
        """What the matrices read each input times, (inputs,); None: as it is."""
        if self.input_exponents is None:
            return None
        if self._scales is None or self._scales.device != self.input_exponents.device:
            powers = [2.0**exponent for exponent in self.input_exponents.tolist()]
            # It is kept: for training, too, where it was first asked for in inference mode.
            with torch.inference_mode(False):
                self._scales = torch.tensor(powers, dtype=torch.float32, device=self.input_exponents.device)
        return self._scales

    def _execution(self, vectors: Any) -> Execution:
        weight = self.ih if self.joint is None else self.joint
        if weight is None:
            return Execution.MATERIALISE
        execution = weight.execution_at(vectors)
        # The input is but a part of what a joint matrix reads.
        return Execution.MATERIALISE if execution is Execution.CONTRACT and weight is self.joint else execution

    @in_full_precision
    def _resolve(self, execution: Execution) -> KernelWeights:
        hr = None if self.hr is None else self.hr.dense()
        places = self.places()
        if hr is not None and places is not None:
            hr = hr.index_select(1, places[1])
        if self.joint is not None:
            return self._resolve_joint(self.joint, execution, hr)
        if self.ih is None or self.hh is None:
            raise RuntimeError("A layer's weights are one joint matrix, or those of the input and of the state.")
        bias_ih, bias_hh = self._biases(self.bias)
        settled = self._settled(execution)
        recurrent: Tensor | tuple[Tensor, Tensor]
        if self.hh.projects:
            rows, cols = self.hh.factors()
            recurrent = self._own_rows(rows), self._own_states(cols)
        else:
            recurrent = self._own_states(self._own_rows(self.hh.dense()).T).T
        if execution is Execution.PROJECT:
            rows, cols = self.ih.factors()
            reduce, ih = self._own_inputs(cols.T), self._own_rows(rows)
            return KernelWeights(reduce, ih, recurrent, bias_ih, bias_hh, hr, settled=settled)
        if execution is Execution.CONTRACT:
            rows_at, scales = None if places is None else places[0], self.input_scales()
            return KernelWeights(self.ih.matrix(), None, recurrent, bias_ih, bias_hh, hr, rows_at, scales, settled)
        ih = self._own_inputs(self._own_rows(self.ih.dense()))
        return KernelWeights(None, ih, recurrent, bias_ih, bias_hh, hr, settled=settled)

    def _resolve_joint(self, joint: Weight, execution: Execution, hr: Tensor | None) -> KernelWeights:
        n, s = self.input_size, self.settings.state_size
        reduce = None
        recurrent: Tensor | tuple[Tensor, Tensor]
        if execution is Execution.PROJECT:
            rows, cols = joint.factors()
            rows = self._own_rows(rows)
            reduce, ih = self._own_inputs(cols[:n].T), rows
            recurrent = rows, self._own_states(cols[n : n + s])
            columns = rows @ cols[n + s :].T
        else:
            dense = self._own_rows(joint.dense())
            ih, columns = self._own_inputs(dense[:, :n]), dense[:, n + s :]
            recurrent = self._own_states(dense[:, n : n + s].T).T
        if columns.shape[1] == 0:
            bias_ih, bias_hh = self._biases(self.bias)
        elif columns.shape[1] == 1:
            bias_ih, bias_hh = self._biases(columns[:, 0])
        else:
            bias_ih, bias_hh = columns[:, 0], columns[:, 1]
        return KernelWeights(reduce, ih, recurrent, bias_ih, bias_hh, hr, settled=self._settled(execution))

    def _own_rows(self, matrix: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Rows from the stored order into the units' own."""
        places = self.places()
        return matrix if places is None else matrix.index_select(0, places[0])

    def _own_states(self, matrix: Float[Tensor, "state n"]) -> Float[Tensor, "state n"]:
        """The same for rows that stand for states; a projection's are no units, and have one order only."""
        places = self.places()
        return matrix if places is None or self.settings.proj_size else matrix.index_select(0, places[1])

    def _own_inputs(self, matrix: Float[Tensor, "n inputs"]) -> Float[Tensor, "n inputs"]:
        """Columns that read the inputs as they are."""
        scales = self.input_scales()
        return matrix if scales is None else (matrix * scales).to(matrix.dtype)

    def _biases(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if bias is None:
            return None, None
        if self.bias_hn is None:
            return bias, torch.zeros_like(bias)
        zeros = bias.new_zeros(self.settings.rows - self.settings.hidden_size)
        return bias, torch.cat([zeros, self.bias_hn])

    def to_config(self) -> dict[str, Any]:
        """The structure as JSON values: forms, layouts, ranks, which biases there are, the words of an order."""
        biases = [name for name in ("bias", "bias_hn") if getattr(self, name) is not None]
        config: dict[str, Any] = {name: weight.to_config() for name, weight in self.weights().items()}
        config["biases"] = biases
        if self.codecs:
            config["codecs"] = {name: codec.to_config() for name, codec in self.codecs.items()}
        if self.order is not None:
            config["order"] = self.order.numel()
        return config if self.input_exponents is None else {**config, "input_exponents": True}

    @classmethod
    def from_config(cls, settings: RecurrentSettings, layer: int, config: dict[str, Any]) -> GateWeights:
        """Weights of this structure, zero; the inverse of `to_config`."""
        gates = cls(settings, layer, GateMatrices())
        for name in ("joint", "ih", "hh", "hr"):
            if name in config:
                setattr(gates, name, weight_from_config(config[name]))
        sizes = {"bias": settings.rows, "bias_hn": settings.hidden_size}
        for name in config["biases"]:
            gates.register_parameter(name, nn.Parameter(torch.zeros(sizes[name], dtype=torch.float32, device="cpu")))
        named = dict(gates.named_parameters())
        for name, codec in config.get("codecs", {}).items():
            own = codec_of(codec)
            count = own.parts(tuple(named[name].shape)).get("scales")
            scales = None if count is None else torch.zeros(count, dtype=torch.int16, device="cpu")
            gates._store(name, own, scales)
        if "order" in config:
            gates.order = torch.zeros(order_words(settings.hidden_size), dtype=torch.int32, device="cpu")
        if config.get("input_exponents"):
            gates.input_exponents = torch.zeros(gates.input_size, dtype=torch.int8, device="cpu")
        return gates

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GateWeights:
        self._forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_layout_of": {}, "_places": None, "_scales": None}


def merge_biases(
    settings: RecurrentSettings, bias_ih: Float[Tensor, " rows"], bias_hh: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " hidden"] | None]:
    """One bias where the function allows it. A GRU's reset gate keeps the hidden candidate's own apart."""
    if not settings.recurrence.keeps_candidate_bias:
        return bias_ih + bias_hh, None
    keep = (settings.gates - 1) * settings.hidden_size
    return torch.cat([bias_ih[:keep] + bias_hh[:keep], bias_ih[keep:]]), bias_hh[keep:].clone()

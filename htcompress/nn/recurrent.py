"""`HTLSTM`, `HTGRU`, `HTRNN` and their cells: drop-ins for the recurrent modules of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htcompress.errors import ShapeError
from htcompress.nn.calling import CalledAsLayers, WithStates
from htcompress.nn.execution import Execution
from htcompress.nn.gates import GateMatrices, GateWeights
from htcompress.nn.kernel import run_cell, run_layer
from htcompress.nn.recurrence import State
from htcompress.nn.settings import RecurrentSettings, StandIn
from htcompress.nn.watched import Watch, watched_cell, watched_layer
from htcompress.vocabulary import Kind


class HTRecurrent(WithStates, StandIn, nn.Module):
    """What the drop-ins share: settings, weights by layer and direction, and torch's calling convention.

    A drop-in is an instance of the torch class that it stands in for, and answers as that does: sizes, `mode`,
    `weight_ih_l0` and its kin (written out of the cores, to be read only), `all_weights`, `flatten_parameters`.

    Build one from a trained module with `htcompress.compress`, or from explicit matrices with
    `from_matrices`; `__init__` takes the settings and one `GateWeights` for each layer and direction.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ()

    settings: RecurrentSettings
    gates: nn.ModuleDict
    watch: Watch | None
    """Is told what passes through the layer, in calibration."""

    def __init__(self, settings: RecurrentSettings, gates: Sequence[GateWeights]) -> None:
        nn.Module.__init__(self)
        if settings.kind not in self.kinds:
            raise ValueError(f"{type(self).__name__} cannot be a {settings.kind}.")
        for name, value in _attributes(settings).items():
            setattr(self, name, value)
        self._take(settings, nn.ModuleDict(dict(zip(settings.direction_names, gates, strict=True))))

    def _take(self, settings: RecurrentSettings, gates: nn.ModuleDict) -> None:
        self.settings = settings
        self.gates = gates
        self.watch = None

    @classmethod
    def from_matrices(cls, settings: RecurrentSettings, matrices: Sequence[GateMatrices]) -> HTRecurrent:
        """The module with these matrices, one `GateMatrices` for each of `settings.directions()`."""
        directions = zip(settings.directions(), matrices, strict=True)
        return cls(settings, [GateWeights(settings, layer, m) for (layer, _, _), m in directions])

    @classmethod
    def from_config(cls, settings: RecurrentSettings, config: dict[str, Any]) -> HTRecurrent:
        """The module of a saved structure, zero; the numbers come from a state_dict."""
        gates = [
            GateWeights.from_config(settings, layer, direction)
            for (layer, _, _), direction in zip(settings.directions(), config.values(), strict=True)
        ]
        return cls(settings, gates)

    def to_config(self) -> dict[str, Any]:
        """The structure of the weights as JSON values, by layer and direction."""
        return {name: gates.to_config() for name, gates in self.directions().items()}

    def directions(self) -> dict[str, GateWeights]:
        """The weights by torch's direction name (`l0`, `l0_reverse`, ...; `cell` for a cell)."""
        return {name: gates for name, gates in self.gates.items() if isinstance(gates, GateWeights)}

    def use_execution(self, execution: Execution | str) -> None:
        """Read the inputs in one way always: `project`, `contract`, `materialise`; `auto` for what costs least.

        Raises `RequestError` where a layout does not admit it.
        """
        for gates in self.directions().values():
            weight = gates.ih if gates.joint is None else gates.joint
            if weight is not None:
                weight.use(execution)

    @property
    def parameter_count(self) -> int:
        """The numbers stored for the recurrence, words of the units' order included."""
        return sum(gates.parameter_count for gates in self.directions().values())

    def store_in(self, bits: int) -> None:
        """Let the numbers be stored in at most so many bits each (32: as they are); they become what is stored."""
        for gates in self.directions().values():
            gates.store_in(bits)

    def round(self) -> None:
        """Take for the numbers what will be decoded of them, in place; for after they were trained."""
        for gates in self.directions().values():
            gates.round()

    def freeze(self, frozen: bool = True) -> None:
        """Take the parameters for unchanging: outside of training what is computed of them is kept unseen.

        Otherwise it is computed again when a parameter has changed, by whatever means. `freeze(False)` takes it back.
        """
        for gates in self.directions().values():
            gates.freeze(frozen)

    # ---- what torch's modules have ---------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # Torch's weights are no attributes of their own: they are written out when somebody asks.
        if name.startswith(("weight_", "bias_")) and "settings" in self.__dict__:
            settings = self.__dict__["settings"]
            for direction, names in zip(settings.direction_names, settings.weight_names, strict=True):
                if name in names:
                    return self._written_out(direction)[name]
        return nn.Module.__getattr__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith(("weight_", "bias_")) and any(name in names for names in self.settings.weight_names):
            raise AttributeError(
                f"{name} of {type(self).__name__} is written out of its cores and can only be read; change the cores, "
                f"or take the dense layer (htcompress export --to dense)."
            )
        nn.Module.__setattr__(self, name, value)

    def _written_out(self, direction: str) -> dict[str, Tensor]:
        """A direction's tensors as torch stores them."""
        whole = self.directions()[direction].written_out()
        index = self.settings.direction_names.index(direction)
        parts = [whole.ih, whole.hh, whole.bias_ih, whole.bias_hh, whole.hr]
        named = zip(self.settings.weight_names[index], (t for t in parts if t is not None), strict=True)
        return dict(named)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """Torch's tensors by layer and direction, written out."""
        return [list(self._written_out(direction).values()) for direction in self.settings.direction_names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [tensor for tensors in self.all_weights for tensor in tensors]

    def flatten_parameters(self) -> None:
        """Nothing to do; torch's modules have it, and models call it."""

    def reset_parameters(self) -> None:
        """Torch's modules draw new weights here; raises `NotImplementedError`, for these were trained."""
        raise NotImplementedError(f"{type(self).__name__} holds trained weights; it cannot draw new ones.")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _replicate_for_data_parallel(self) -> Any:
        return nn.Module._replicate_for_data_parallel(self)

    def extra_repr(self) -> str:
        s = self.settings
        parts = [f"{s.input_size}, {s.hidden_size}"]
        defaults = RecurrentSettings(s.kind, s.input_size, s.hidden_size)
        for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"):
            if getattr(s, name) != getattr(defaults, name):
                parts.append(f"{name}={getattr(s, name)}")
        parts += [f"activations={s.activations}"] if s.activations else []
        parts += ["resets_before=True"] if s.resets_before else []
        return ", ".join([*parts, f"parameters={self.parameter_count} of {s.dense_parameters}"])


class HTLayers(CalledAsLayers, HTRecurrent):
    """The drop-ins for `nn.LSTM`, `nn.GRU` and `nn.RNN`: whole sequences, layers, directions."""

    def _run(self, x: Tensor, batch_sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
        s = self.settings
        directions = list(self.directions().items())
        last: list[State] = []
        for layer in range(s.num_layers):
            span = slice(layer * s.num_directions, (layer + 1) * s.num_directions)
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            before = tuple(t[span].contiguous() for t in state)
            if self.watch is not None:
                x, after = watched_layer(s, directions[span], x, batch_sizes, before, self.watch)
            else:
                weights = [g.resolve(x.numel() // max(1, x.shape[-1])) for _, g in directions[span]]
                x, after = run_layer(s.recurrence, x, batch_sizes, before, weights)
            last.append(after)
        return x, tuple(torch.cat(parts) for parts in zip(*last, strict=True))


class HTLSTM(HTLayers, nn.LSTM):  # type: ignore[misc]
    """`torch.nn.LSTM` with its weights in Hierarchical Tucker form."""

    kinds = (Kind.LSTM,)


class HTGRU(HTLayers, nn.GRU):  # type: ignore[misc]
    """`torch.nn.GRU` with its weights in Hierarchical Tucker form."""

    kinds = (Kind.GRU,)


class HTRNN(HTLayers, nn.RNN):  # type: ignore[misc]
    """`torch.nn.RNN` (tanh or relu) with its weights in Hierarchical Tucker form."""

    kinds = (Kind.RNN_TANH, Kind.RNN_RELU)


class HTCell(HTRecurrent):
    """The drop-ins for torch's cells: one time step a call."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: `input` (batch, features) or (features,); the state alike; returns the next state."""
        s = self.settings
        if input.ndim not in (1, 2) or input.shape[-1] != s.input_size:
            raise ShapeError(
                f"{type(self).__name__} expects a 1-D or 2-D input with {s.input_size} features last; "
                f"found shape {tuple(input.shape)}."
            )
        batch = tuple(input.shape[:-1])
        state = self._zeros(input, *batch) if hx is None else self._given(hx, batch)
        if input.ndim == 1:
            input, state = input.unsqueeze(0), tuple(t.unsqueeze(0) for t in state)
        after = self._run(input, state)
        if not batch:
            after = tuple(t.squeeze(0) for t in after)
        return self._as_torch(after)

    def _run(self, x: Tensor, state: State) -> State:
        ((name, gates),) = self.directions().items()
        if self.watch is not None:
            return watched_cell(self.settings, name, gates, x, state, self.watch)
        return run_cell(self.settings.recurrence, x, state, gates.resolve(x.shape[0]))


class HTLSTMCell(HTCell, nn.LSTMCell):
    """`torch.nn.LSTMCell` with its weights in Hierarchical Tucker form."""

    kinds = (Kind.LSTM,)


class HTGRUCell(HTCell, nn.GRUCell):
    """`torch.nn.GRUCell` with its weights in Hierarchical Tucker form."""

    kinds = (Kind.GRU,)


class HTRNNCell(HTCell, nn.RNNCell):
    """`torch.nn.RNNCell` (tanh or relu) with its weights in Hierarchical Tucker form."""

    kinds = (Kind.RNN_TANH, Kind.RNN_RELU)


FAMILY: tuple[type[HTRecurrent], ...] = (HTLSTM, HTGRU, HTRNN, HTLSTMCell, HTGRUCell, HTRNNCell)


def module_class(settings: RecurrentSettings) -> type[HTRecurrent]:
    """The drop-in for these settings."""
    return next(cls for cls in FAMILY if settings.kind in cls.kinds and issubclass(cls, HTCell) == settings.cell)


def _attributes(settings: RecurrentSettings) -> dict[str, Any]:
    """What torch's module keeps of its constructor's arguments."""
    found: dict[str, Any] = {
        "input_size": settings.input_size,
        "hidden_size": settings.hidden_size,
        "bias": settings.bias,
    }
    if settings.recurrence.nonlinearity is not None:
        found["nonlinearity"] = settings.recurrence.nonlinearity
    if not settings.cell:
        names = ("mode", "num_layers", "batch_first", "dropout", "bidirectional", "proj_size")
        found |= {name: getattr(settings, name) for name in names}
    return found

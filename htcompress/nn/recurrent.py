"""`HTLSTM`, `HTGRU`, `HTRNN` and their cells: drop-ins for the recurrent modules of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from htcompress.errors import ShapeError
from htcompress.nn.kernel import run_cell, run_layer
from htcompress.nn.plan import Plan
from htcompress.nn.settings import Kind, RecurrentSettings
from htcompress.nn.stepwise import State
from htcompress.nn.weights import FactoredWeight, GateMatrices, GateWeights


class HTRecurrent(nn.Module):
    """What the drop-ins share: settings, weights by layer and direction, and torch's calling convention.

    Build one from a trained module with `htcompress.compress`, or from explicit matrices with
    `from_matrices`; `__init__` takes the settings and one `GateWeights` for each layer and direction.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ()

    def __init__(self, settings: RecurrentSettings, gates: Sequence[GateWeights]) -> None:
        super().__init__()
        if settings.kind not in self.kinds:
            raise ValueError(f"{type(self).__name__} cannot be a {settings.kind}.")
        self.settings = settings
        names = settings.slot_names
        self.gates = nn.ModuleDict(dict(zip(names, gates, strict=True)))

    @classmethod
    def from_matrices(cls, settings: RecurrentSettings, matrices: Sequence[GateMatrices]) -> HTRecurrent:
        """The module with these matrices, one `GateMatrices` for each of `settings.slots()`."""
        slots = zip(settings.slots(), matrices, strict=True)
        return cls(settings, [GateWeights(settings, layer, m) for (layer, _, _), m in slots])

    @classmethod
    def from_config(cls, settings: RecurrentSettings, config: dict[str, Any]) -> HTRecurrent:
        """The module of a saved structure, zero; the numbers come from a state_dict."""
        gates = [
            GateWeights.from_config(settings, layer, slot)
            for (layer, _, _), slot in zip(settings.slots(), config.values(), strict=True)
        ]
        return cls(settings, gates)

    def to_config(self) -> dict[str, Any]:
        """The structure of the weights as JSON values, by layer and direction."""
        return {name: gates.to_config() for name, gates in self.slots().items()}

    def slots(self) -> dict[str, GateWeights]:
        """The weights by torch's slot name (`l0`, `l0_reverse`, ...; `cell` for a cell)."""
        return {name: gates for name, gates in self.gates.items() if isinstance(gates, GateWeights)}

    def use_plan(self, plan: Plan | str) -> None:
        """Read the inputs by one plan always: `project`, `contract`, `materialise`; `auto` for what costs least.

        Raises `RequestError` where a layout does not admit it.
        """
        for gates in self.slots().values():
            weight = gates.ih if gates.joint is None else gates.joint
            if isinstance(weight, FactoredWeight):
                weight.use(plan)

    @property
    def parameter_count(self) -> int:
        """The numbers stored."""
        return sum(p.numel() for p in self.parameters())

    def __getattr__(self, name: str) -> Any:
        # The settings answer where torch's modules have attributes: hidden_size, batch_first, ...
        if name in RecurrentSettings.__dataclass_fields__ and name not in ("kind", "cell"):
            return getattr(self.__dict__["settings"], name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        s = self.settings
        parts = [f"{s.input_size}, {s.hidden_size}"]
        defaults = RecurrentSettings(s.kind, s.input_size, s.hidden_size)
        for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"):
            if getattr(s, name) != getattr(defaults, name):
                parts.append(f"{name}={getattr(s, name)}")
        return ", ".join([*parts, f"parameters={self.parameter_count} of {s.dense_parameters}"])

    def _zeros(self, like: Tensor, *shape: int | torch.SymInt) -> State:
        """The initial state: h, and c for an LSTM, whose size differs where there is a projection."""
        h = like.new_zeros(*shape, self.settings.state_size)
        return (h, like.new_zeros(*shape, self.settings.hidden_size)) if self.settings.kind is Kind.LSTM else (h,)

    def _given(self, hx: Any, expected: tuple[int | torch.SymInt, ...]) -> State:
        """The caller's state as a tuple, its shapes checked."""
        if self.settings.kind is Kind.LSTM:
            if not (isinstance(hx, tuple | list) and len(hx) == 2):
                raise ShapeError("The initial state of an LSTM is a pair (h_0, c_0).")
            state, sizes = tuple(hx), [self.settings.state_size, self.settings.hidden_size]
        else:
            state, sizes = (hx,), [self.settings.state_size]
        for name, tensor, size in zip(("h_0", "c_0"), state, sizes, strict=False):
            if tuple(tensor.shape) != (*expected, size):
                raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {(*expected, size)}.")
        return state

    def _as_torch(self, state: State) -> Any:
        return state if self.settings.kind is Kind.LSTM else state[0]


class HTLayers(HTRecurrent):
    """The drop-ins for `nn.LSTM`, `nn.GRU` and `nn.RNN`: whole sequences, layers, directions."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Tensor | PackedSequence, Any]:
        """The call of torch's module, with its shapes.

        Args:
            input: (time, batch, features), (batch, time, features) with `batch_first`, (time, features)
                without a batch, or a packed sequence.
            hx: h_0, or (h_0, c_0) for an LSTM: (layers * directions, batch, size); zeros if None.

        Returns:
            the outputs of the last layer and the last state of every layer, as torch's module does.

        Raises:
            ShapeError: the input or the state does not fit the settings.
        """
        s = self.settings
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, back = input
            self._check_features(data, (2,))
            # Without sequences of its own order the batch is as large as the first time step.
            state = self._state(data, int(batch_sizes[0]), hx, order)
            data, state = self._run(data, batch_sizes, state)
            if back is not None:
                state = tuple(t.index_select(1, back) for t in state)
            return PackedSequence(data, batch_sizes, order, back), self._as_torch(state)
        self._check_features(input, (2, 3))
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(1)
        if batched and s.batch_first:
            x = x.transpose(0, 1)
        if hx is not None and not batched:
            given = self._given(hx, (s.num_layers * s.directions,))
            hx = self._as_torch(tuple(t.unsqueeze(1) for t in given))
        out, state = self._run(x, None, self._state(x, x.shape[1], hx, None))
        if not batched:
            return out.squeeze(1), self._as_torch(tuple(t.squeeze(1) for t in state))
        return (out.transpose(0, 1) if s.batch_first else out), self._as_torch(state)

    def flatten_parameters(self) -> None:
        """Nothing to do; torch's modules have it, and models call it."""

    def _check_features(self, x: Tensor, dims: tuple[int, ...]) -> None:
        if x.ndim not in dims or x.shape[-1] != self.settings.input_size:
            expected = " or ".join(f"{d}-D" for d in dims)
            raise ShapeError(
                f"{type(self).__name__} expects a {expected} input with {self.settings.input_size} features "
                f"last; found shape {tuple(x.shape)}."
            )

    def _state(self, like: Tensor, batch: int | torch.SymInt, hx: Any, order: Tensor | None) -> State:
        stack = self.settings.num_layers * self.settings.directions
        if hx is None:
            return self._zeros(like, stack, batch)
        state = self._given(hx, (stack, batch))
        return state if order is None else tuple(t.index_select(1, order) for t in state)

    def _run(self, x: Tensor, batch_sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
        s = self.settings
        gates = list(self.slots().values())
        last: list[State] = []
        for layer in range(s.num_layers):
            span = slice(layer * s.directions, (layer + 1) * s.directions)
            if layer > 0 and s.dropout > 0:
                x = F.dropout(x, s.dropout, self.training)
            weights = [g.resolve(x.numel() // max(1, x.shape[-1])) for g in gates[span]]
            x, after = run_layer(s.kind, x, batch_sizes, tuple(t[span].contiguous() for t in state), weights)
            last.append(after)
        return x, tuple(torch.cat(parts) for parts in zip(*last, strict=True))


class HTLSTM(HTLayers):
    """`torch.nn.LSTM` with its weights in Hierarchical Tucker form."""

    kinds = (Kind.LSTM,)


class HTGRU(HTLayers):
    """`torch.nn.GRU` with its weights in Hierarchical Tucker form."""

    kinds = (Kind.GRU,)


class HTRNN(HTLayers):
    """`torch.nn.RNN` (tanh or relu) with its weights in Hierarchical Tucker form."""

    kinds = (Kind.RNN_TANH, Kind.RNN_RELU)

    @property
    def nonlinearity(self) -> str:
        return self.settings.kind.removeprefix("rnn_")


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
        (gates,) = self.slots().values()
        return run_cell(self.settings.kind, x, state, gates.resolve(len(x)))


class HTLSTMCell(HTCell):
    """`torch.nn.LSTMCell` with its weights in Hierarchical Tucker form."""

    kinds = (Kind.LSTM,)


class HTGRUCell(HTCell):
    """`torch.nn.GRUCell` with its weights in Hierarchical Tucker form."""

    kinds = (Kind.GRU,)


class HTRNNCell(HTCell):
    """`torch.nn.RNNCell` (tanh or relu) with its weights in Hierarchical Tucker form."""

    kinds = (Kind.RNN_TANH, Kind.RNN_RELU)


def module_class(settings: RecurrentSettings) -> type[HTRecurrent]:
    """The drop-in for these settings."""
    family: tuple[type[HTRecurrent], ...] = (
        (HTLSTMCell, HTGRUCell, HTRNNCell) if settings.cell else (HTLSTM, HTGRU, HTRNN)
    )
    return next(cls for cls in family if settings.kind in cls.kinds)

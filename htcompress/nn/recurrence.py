"""The recurrences: one record for each kind, with everything that differs between an LSTM, a GRU and an RNN.

A new kind is a word in `htcompress.vocabulary.Kind`, a record here, and its drop-ins in `htcompress.nn.recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from htcompress.nn.activations import ACTIVATIONS
from htcompress.values import mixed_precision
from htcompress.vocabulary import Kind

State = tuple[Tensor, ...]
"""(h,), or (h, c) of an LSTM."""


def _wide(tensor: Tensor) -> Tensor:
    """At least in float32: in mixed precision kernels want one for all, and states add up what is lost in each step."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class OnnxOperator:
    """How ONNX computes a recurrence.

    Attributes:
        name: of the operator.
        gate_order: torch's gates in the operator's order.
        attributes: what tells the operator to compute as torch does.
        activations: the words of each direction's activations, where they are not the operator's own.
    """

    name: str
    gate_order: tuple[int, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    activations: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class StateProduct:
    """W_hh as the steps of a loop multiply by it.

    Attributes:
        rows: (rows, state), or the factor (rows, r) of a product of two.
        factor: the other one, (state, r); None where `rows` is the whole.
        bias: (rows,) of the hidden part, where it cannot be merged with that of the input.
        hr: (proj, hidden), what projects the state; None where nothing does.
    """

    rows: Float[Tensor, "rows r"]
    factor: Float[Tensor, "state r"] | None = None
    bias: Float[Tensor, " rows"] | None = None
    hr: Float[Tensor, "proj hidden"] | None = None

    def added(self, z: Float[Tensor, "batch rows"], h: Float[Tensor, "batch state"]) -> Float[Tensor, "batch rows"]:
        """z + W_hh h."""
        return torch.addmm(z, self._read(h), self.rows.T)

    def biased(self, h: Float[Tensor, "batch state"]) -> Float[Tensor, "batch rows"]:
        """W_hh h + b."""
        return F.linear(self._read(h), self.rows, self.bias)

    def parted(self, at: int) -> tuple[StateProduct, StateProduct]:
        """The products with the rows before one, and with those from it on."""
        return StateProduct(self.rows[:at], self.factor), StateProduct(self.rows[at:], self.factor)

    def _read(self, h: Tensor) -> Tensor:
        return h if self.factor is None else h @ self.factor


Function = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, StateProduct, State, Function, Function], State]


@dataclass(frozen=True)
class Recurrence:
    """One kind of recurrence.

    Attributes:
        kind: its word.
        gates: how many blocks of `hidden_size` rows the weight matrices have.
        states: 1 for h, 2 for h and c.
        torch_layer, torch_cell: torch's modules.
        nonlinearity: torch's word for it where one module computes several recurrences.
        keeps_candidate_bias: the last gate's hidden bias is multiplied by another gate, so that it cannot be merged
            with the input's (the reset gate of torch's and cuDNN's GRU).
        projects: whether the state may be projected (`proj_size`).
        has_reset: whether it has a reset gate.
        layer: torch's native kernel for whole sequences; takes the state as the kernel does.
        cell: the same for one time step.
        step: one time step, from W_ih x + b (batch, rows), W_hh, the state, and the activations of the gates and of
            all else.
        onnx: the operator of ONNX.
        activations: the words of both; of an RNN, which has no gates, the last counts.
        resets_before: whether a GRU's reset gate is multiplied with the state before the candidate's matrix, as ONNX's
            does unless it is told otherwise, and Keras's with `reset_after=False`.
        native: whether torch has a kernel for it; else it is run step by step.
        compiled: what computes it in `program.c`; empty where nothing does.
    """

    kind: Kind
    gates: int
    states: int
    torch_layer: type[nn.Module]
    torch_cell: type[nn.Module]
    layer: Callable[..., Any]
    cell: Callable[..., Any]
    step: Step
    onnx: OnnxOperator
    nonlinearity: str | None = None
    keeps_candidate_bias: bool = False
    projects: bool = False
    has_reset: bool = False
    activations: tuple[str, str] = ("sigmoid", "tanh")
    resets_before: bool = False
    native: bool = True
    compiled: str = ""

    @property
    def said(self) -> str:
        """What it has that torch's has not, in words."""
        gate, own = self.activations
        words = [f"the activations {gate} and {own}" if self.gates > 1 else f"the activation {own}"]
        return " and ".join([*words, *["a reset gate before the matrix"] * self.resets_before])

    def stepped(self, z: Float[Tensor, "batch rows"], product: StateProduct, state: State) -> State:
        """The next state, from W_ih x + b and the last one."""
        gate, own = (ACTIVATIONS[word].apply for word in self.activations)
        return self.step(z, product, state, gate, own)

    def adapted(self, activations: tuple[str, ...], *, resets_before: bool) -> Recurrence:
        """The same with other activations (of the gates, if it has any, and of all else), or another reset gate."""
        gate, own = ("sigmoid", *activations)[-2:] if activations else self.activations
        if unknown := {gate, own} - set(ACTIVATIONS):
            raise ValueError(f"There is no activation {unknown.pop()}; expected one of {', '.join(ACTIVATIONS)}.")
        if resets_before and not self.has_reset:
            raise ValueError(f"A {self.kind} has no reset gate.")
        if (gate, own) == self.activations and not resets_before:
            return self
        return replace(
            self,
            step=_reset_before_step if resets_before else self.step,
            onnx=replace(
                self.onnx,
                attributes={} if resets_before else self.onnx.attributes,
                activations=(gate, *[own] * self.states) if self.gates > 1 else (own,),
            ),
            keeps_candidate_bias=self.keeps_candidate_bias and not resets_before,
            activations=(gate, own),
            resets_before=resets_before,
            native=False,
            compiled="",
        )

    def run(
        self,
        x: Float[Tensor, "*time_batch features"],
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        *,
        biased: bool,
        training: bool,
        bidirectional: bool,
    ) -> tuple[Tensor, State]:
        """One layer by the native kernel: the outputs, and the last state.

        Args:
            batch_sizes: of a packed sequence; None where `x` is (time, batch, features).
            weights: torch's tensors, direction by direction.
            training: whether cuDNN has to keep what a backward pass needs.
        """
        if mixed_precision(x.device) is not None:
            with torch.autocast(x.device.type, enabled=False):
                x, state, weights = _wide(x), tuple(map(_wide, state)), list(map(_wide, weights))
                return self.run(
                    x, batch_sizes, state, weights, biased=biased, training=training, bidirectional=bidirectional
                )
        given = tuple(state) if self.states > 1 else state[0]
        options = (biased, 1, 0.0, training, bidirectional)
        if batch_sizes is None:
            out, *last = self.layer(x, given, weights, *options, False)
        else:
            out, *last = self.layer(x, batch_sizes, given, weights, *options)
        return out, tuple(last)

    def run_cell(self, x: Tensor, state: Sequence[Tensor], *weights: Tensor | None) -> State:
        """One time step by the native kernel."""
        if mixed_precision(x.device) is not None:
            with torch.autocast(x.device.type, enabled=False):
                wide = [None if w is None else _wide(w) for w in weights]
                return self.run_cell(_wide(x), tuple(map(_wide, state)), *wide)
        after = self.cell(x, tuple(state) if self.states > 1 else state[0], *weights)
        return tuple(after) if self.states > 1 else (after,)

    def state_gradients(
        self,
        gradients: Float[Tensor, "n rows"],
        z: Float[Tensor, "n rows"],
        h: Float[Tensor, "n state"],
        hh: Float[Tensor, "rows state"],
        bias: Float[Tensor, " rows"] | None,
    ) -> Float[Tensor, "n rows"]:
        """The gradients at W_hh h, from those at W_ih x.

        They are the same but where a gate stands before the candidate's hidden part,
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn)): that part sees the gradient through r.

        Args:
            z: W_ih x.
            bias: the merged bias of the gates.
        """
        if not self.keeps_candidate_bias:
            return gradients
        before = (self.gates - 1) * (z.shape[1] // self.gates)
        reset = self._reset(z, h, hh, bias)
        return torch.cat([gradients[:, :before], gradients[:, before:] * reset], dim=1)

    def state_inputs(
        self,
        z: Float[Tensor, "n rows"],
        h: Float[Tensor, "n state"],
        hh: Float[Tensor, "rows state"],
        bias: Float[Tensor, " rows"] | None,
    ) -> Float[Tensor, "n state"]:
        """What W_hh reads, arguments as those of `state_gradients`.

        That is the state but where the candidate's rows read it through the reset gate: then, of the time steps, as
        large a part as that of those rows has r * h.
        """
        if not self.resets_before:
            return h
        # Steps that no period of the data falls in with.
        through = torch.arange(len(h), device=h.device) * _GOLDEN % 1.0 < 1 / self.gates
        return torch.where(through[:, None], self._reset(z, h, hh, bias) * h, h)

    def _reset(self, z: Tensor, h: Tensor, hh: Tensor, bias: Tensor | None) -> Tensor:
        """The reset gate of a GRU, which stands first."""
        size = z.shape[1] // self.gates
        reset = z[:, :size] + h @ hh[:size].T
        return ACTIVATIONS[self.activations[0]].apply(reset if bias is None else reset + bias[:size])


_GOLDEN = (5**0.5 - 1) / 2


def _lstm_step(z: Tensor, product: StateProduct, state: State, gate: Function, own: Function) -> State:
    gates = product.added(z, state[0])
    i, f, _g, o = gate(gates).chunk(4, dim=-1)
    c = torch.addcmul(f * state[1], i, own(gates.chunk(4, dim=-1)[2]))
    h = o * own(c)
    return (h if product.hr is None else F.linear(h, product.hr)), c


def _gru_step(z: Tensor, product: StateProduct, state: State, gate: Function, own: Function) -> State:
    (h,) = state
    x_gates, x_new = z.tensor_split([2 * h.shape[-1]], dim=-1)
    h_gates, h_new = product.biased(h).tensor_split([2 * h.shape[-1]], dim=-1)
    reset, update = gate(x_gates + h_gates).chunk(2, dim=-1)
    new = own(x_new + reset * h_new)
    return (new + update * (h - new),)


def _reset_before_step(z: Tensor, product: StateProduct, state: State, gate: Function, own: Function) -> State:
    (h,) = state
    x_gates, x_new = z.tensor_split([2 * h.shape[-1]], dim=-1)
    gates, candidate = product.parted(2 * h.shape[-1])
    reset, update = gate(gates.added(x_gates, h)).chunk(2, dim=-1)
    new = own(candidate.added(x_new, reset * h))
    return (new + update * (h - new),)


def _rnn_step(z: Tensor, product: StateProduct, state: State, gate: Function, own: Function) -> State:
    return (own(product.added(z, state[0])),)


RECURRENCES: tuple[Recurrence, ...] = (
    Recurrence(
        Kind.LSTM,
        gates=4,
        states=2,
        torch_layer=nn.LSTM,
        torch_cell=nn.LSTMCell,
        layer=torch.lstm,
        cell=torch.lstm_cell,
        step=_lstm_step,
        onnx=OnnxOperator("LSTM", (0, 3, 1, 2)),  # i o f c of i f g o
        projects=True,
        compiled="lstm",
    ),
    Recurrence(
        Kind.GRU,
        gates=3,
        states=1,
        torch_layer=nn.GRU,
        torch_cell=nn.GRUCell,
        layer=torch.gru,
        cell=torch.gru_cell,
        step=_gru_step,
        onnx=OnnxOperator("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z r h of r z n
        keeps_candidate_bias=True,
        has_reset=True,
        compiled="gru",
    ),
    Recurrence(
        Kind.RNN_TANH,
        gates=1,
        states=1,
        torch_layer=nn.RNN,
        torch_cell=nn.RNNCell,
        layer=torch.rnn_tanh,
        cell=torch.rnn_tanh_cell,
        step=_rnn_step,
        onnx=OnnxOperator("RNN", (0,)),
        nonlinearity="tanh",
        compiled="rnn_tanh",
    ),
    Recurrence(
        Kind.RNN_RELU,
        gates=1,
        states=1,
        torch_layer=nn.RNN,
        torch_cell=nn.RNNCell,
        layer=torch.rnn_relu,
        cell=torch.rnn_relu_cell,
        step=_rnn_step,
        onnx=OnnxOperator("RNN", (0,), activations=("relu",)),
        nonlinearity="relu",
        activations=("sigmoid", "relu"),
        compiled="rnn_relu",
    ),
)
"""Every kind; of those that a state_dict does not tell apart, torch's default stands first."""

TORCH_CLASSES: tuple[type[nn.Module], ...] = tuple(
    dict.fromkeys(cls for r in RECURRENCES for cls in (r.torch_layer, r.torch_cell))
)
"""The recurrent modules of torch."""

_BY_KIND = {recurrence.kind: recurrence for recurrence in RECURRENCES}


@cache
def recurrence_of(kind: Kind | str, activations: tuple[str, ...] = (), *, resets_before: bool = False) -> Recurrence:
    """The record of a kind; activations and the reset gate are torch's unless others are given."""
    return _BY_KIND[Kind(kind)].adapted(activations, resets_before=resets_before)


def with_gates(gates: int) -> Recurrence | None:
    """The recurrence whose matrices have so many blocks of rows; None where there is none."""
    return next((recurrence for recurrence in RECURRENCES if recurrence.gates == gates), None)


def with_nonlinearity(word: str) -> Recurrence | None:
    """The recurrence that has torch's word for a nonlinearity."""
    return next((recurrence for recurrence in RECURRENCES if recurrence.nonlinearity == word), None)

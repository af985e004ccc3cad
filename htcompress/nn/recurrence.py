"""The recurrences: one record for each kind, with everything that differs between an LSTM, a GRU and an RNN.

A new kind is a word in `htcompress.vocabulary.Kind`, a record here, and its drop-ins in `htcompress.nn.recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

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
        activations: the names of each direction's activations; empty: the operator's own.
    """

    name: str
    gate_order: tuple[int, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    activations: tuple[str, ...] = ()


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
        layer: torch's native kernel for whole sequences; takes the state as the kernel does.
        cell: the same for one time step.
        step: one time step from W_ih x + b: (z, read, rows, bias_hh, hr, state) to the next state, where the state's
            part of the gates is `read @ rows.T`.
        onnx: the operator of ONNX.
    """

    kind: Kind
    gates: int
    states: int
    torch_layer: type[nn.Module]
    torch_cell: type[nn.Module]
    layer: Callable[..., Any]
    cell: Callable[..., Any]
    step: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, State], State]
    onnx: OnnxOperator
    nonlinearity: str | None = None
    keeps_candidate_bias: bool = False
    projects: bool = False

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
        size = z.shape[1] // self.gates
        reset = z[:, :size] + h @ hh[:size].T
        if bias is not None:
            reset = reset + bias[:size]
        before = (self.gates - 1) * size
        return torch.cat([gradients[:, :before], gradients[:, before:] * torch.sigmoid(reset)], dim=1)


def _lstm_step(z: Tensor, read: Tensor, rows: Tensor, _: Tensor | None, hr: Tensor | None, state: State) -> State:
    gates = torch.addmm(z, read, rows.T)
    i, f, _g, o = gates.sigmoid().chunk(4, dim=-1)
    c = torch.addcmul(f * state[1], i, gates.chunk(4, dim=-1)[2].tanh())
    h = o * c.tanh()
    return (h if hr is None else F.linear(h, hr)), c


def _gru_step(z: Tensor, read: Tensor, rows: Tensor, bias_hh: Tensor | None, _: Tensor | None, state: State) -> State:
    (h,) = state
    x_gates, x_new = z.tensor_split([2 * h.shape[-1]], dim=-1)
    h_gates, h_new = F.linear(read, rows, bias_hh).tensor_split([2 * h.shape[-1]], dim=-1)
    reset, update = (x_gates + h_gates).sigmoid().chunk(2, dim=-1)
    new = (x_new + reset * h_new).tanh()
    return (new + update * (h - new),)


def _tanh_step(z: Tensor, read: Tensor, rows: Tensor, _: Tensor | None, __: Tensor | None, ___: State) -> State:
    return (torch.addmm(z, read, rows.T).tanh(),)


def _relu_step(z: Tensor, read: Tensor, rows: Tensor, _: Tensor | None, __: Tensor | None, ___: State) -> State:
    return (torch.addmm(z, read, rows.T).relu(),)


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
    ),
    Recurrence(
        Kind.RNN_TANH,
        gates=1,
        states=1,
        torch_layer=nn.RNN,
        torch_cell=nn.RNNCell,
        layer=torch.rnn_tanh,
        cell=torch.rnn_tanh_cell,
        step=_tanh_step,
        onnx=OnnxOperator("RNN", (0,)),
        nonlinearity="tanh",
    ),
    Recurrence(
        Kind.RNN_RELU,
        gates=1,
        states=1,
        torch_layer=nn.RNN,
        torch_cell=nn.RNNCell,
        layer=torch.rnn_relu,
        cell=torch.rnn_relu_cell,
        step=_relu_step,
        onnx=OnnxOperator("RNN", (0,), activations=("Relu",)),
        nonlinearity="relu",
    ),
)
"""Every kind; of those that a state_dict does not tell apart, torch's default stands first."""

TORCH_CLASSES: tuple[type[nn.Module], ...] = tuple(
    dict.fromkeys(cls for r in RECURRENCES for cls in (r.torch_layer, r.torch_cell))
)
"""The recurrent modules of torch."""

_BY_KIND = {recurrence.kind: recurrence for recurrence in RECURRENCES}


def recurrence_of(kind: Kind | str) -> Recurrence:
    """The record of a kind."""
    return _BY_KIND[Kind(kind)]


def with_gates(gates: int) -> Recurrence | None:
    """The recurrence whose matrices have so many blocks of rows; None where there is none."""
    return next((recurrence for recurrence in RECURRENCES if recurrence.gates == gates), None)


def with_nonlinearity(word: str) -> Recurrence | None:
    """The recurrence that has torch's word for a nonlinearity."""
    return next((recurrence for recurrence in RECURRENCES if recurrence.nonlinearity == word), None)

"""One recurrent layer step by step, with the recurrent matrix left as a product of two factors.

torch's native kernels need the whole matrix, rows x state. Where its rank is small beside them, two thin products
in a loop over the time steps cost a fraction, forwards and backwards, of writing it out and multiplying by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from htcompress.nn.settings import Kind
from htcompress.nn.weights import KernelWeights

State = tuple[Tensor, ...]

_STEP = 2_000_000
"""The multiplications that a step of the loop costs beside its own, in calls of small operations."""


def pays(x: Tensor, batch_sizes: Tensor | None, weights: Sequence[KernelWeights]) -> bool:
    """Whether the loop saves more multiplications than its steps cost."""
    if batch_sizes is not None or any(w.factors is None for w in weights):
        return False
    steps, batch = x.shape[:2]
    saved = 0
    for w in weights:
        assert w.factors is not None
        rows, rank = w.factors[0].shape
        state = w.factors[1].shape[0]
        # Outside of training the whole matrix is written out once and kept.
        written = rows * state * rank if torch.is_grad_enabled() else 0
        saved += written + steps * batch * (rows * state - rank * (rows + state))
    return saved > _STEP * steps * len(weights)


def run_stepwise(kind: Kind, x: Tensor, state: State, weights: Sequence[KernelWeights]) -> tuple[Tensor, State]:
    """All time steps of one layer, one or two directions; shapes as `run_layer`, `x` not packed."""
    outputs, last = [], []
    for index, w in enumerate(weights):
        features = x if w.reduce is None else F.linear(x, w.reduce)
        steps = F.linear(features, w.ih, w.bias_ih).unbind(0)
        current = tuple(t[index] for t in state)
        states = []
        for z in reversed(steps) if index == 1 else steps:
            current = _step(kind, z, current, w)
            states.append(current[0])
        outputs.append(torch.stack(states[::-1] if index == 1 else states))
        last.append(current)
    return torch.cat(outputs, dim=-1), tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _step(kind: Kind, z: Tensor, state: State, w: KernelWeights) -> State:
    assert w.factors is not None
    rows, cols = w.factors
    h = state[0]
    beside = F.linear(h @ cols, rows, w.bias_hh)
    if kind is Kind.LSTM:
        i, f, g, o = (z + beside).chunk(4, dim=-1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if w.hr is None else F.linear(h, w.hr)), c
    if kind is Kind.GRU:
        x_gates, x_new = z.tensor_split([2 * h.shape[-1]], dim=-1)
        h_gates, h_new = beside.tensor_split([2 * h.shape[-1]], dim=-1)
        reset, update = (x_gates + h_gates).sigmoid().chunk(2, dim=-1)
        new = (x_new + reset * h_new).tanh()
        return (new + update * (h - new),)
    total = z + beside
    return (total.tanh() if kind is Kind.RNN_TANH else total.relu(),)

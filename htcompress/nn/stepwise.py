"""One recurrent layer step by step, with the recurrent matrix left as a product of two factors where it is one.

torch's native kernels need the whole matrix, rows x state. Where its rank is small beside them, two thin products
in a loop over the time steps cost a fraction, forwards and backwards, of writing it out and multiplying by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from htcompress.nn.kernel_weights import KernelWeights
from htcompress.nn.recurrence import Recurrence, State, StateProduct
from htcompress.nn.tracing import is_tracing

_STEP = 1_000_000
"""The multiplications that a step of the loop costs beside its own, in calls of small operations; twice in training."""

_COLD = 16
"""What the first reading of a matrix costs for each of its numbers, in multiplications."""


def pays(x: Tensor, batch_sizes: Tensor | None, weights: Sequence[KernelWeights]) -> bool:
    """Whether the loop saves more multiplications than its steps cost."""
    steps, batch = x.shape[:2]
    if batch_sizes is not None or is_tracing():
        return False  # a loop would be unrolled, and fix the number of steps
    if not (isinstance(steps, int) and isinstance(batch, int)):
        return False
    return pays_at(steps, batch, weights, learning=torch.is_grad_enabled())


def pays_at(steps: int, batch: int, weights: Sequence[KernelWeights], *, learning: bool) -> bool:
    """The same for so many steps of so many sequences, gradients recorded or not."""
    if all(w.factors is None and w.ih is not None for w in weights):
        return False
    # Each number of a matrix is multiplied once for every item of every step, and read once a step.
    uses = steps * (batch + 1) + _COLD
    saved = 0
    for w in weights:
        if w.factors is not None:
            rows, rank = w.factors[0].shape
            state = w.factors[1].shape[0]
            # Outside of training the whole matrix is written out once and kept.
            written = rows * state * rank if learning else 0
            saved += written + uses * (rows * state - rank * (rows + state))
        if w.ih is None:
            # The kernel multiplies W_ih x by an identity.
            rows = w.factors[0].shape[0] if w.factors is not None else w.hh.shape[0]
            saved += uses * rows**2
    return saved > _STEP * (2 if learning else 1) * steps * len(weights)


def run_stepwise(
    recurrence: Recurrence, x: Tensor, batch_sizes: Tensor | None, state: State, weights: Sequence[KernelWeights]
) -> tuple[Tensor, State]:
    """All time steps of one layer, one or two directions; shapes as `run_layer`."""
    outputs, last = [], []
    for index, w in enumerate(weights):
        z = w.features(x)
        if w.ih is not None:
            z = F.linear(z, w.ih)
        own = tuple(t[index] for t in state)
        out, after = run_direction(recurrence, z, batch_sizes, own, w, reverse=index == 1)
        outputs.append(out)
        last.append(after)
    return torch.cat(outputs, dim=-1), tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def run_direction(
    recurrence: Recurrence,
    z: Tensor,
    batch_sizes: Tensor | None,
    state: State,
    weights: KernelWeights,
    *,
    reverse: bool,
) -> tuple[Tensor, State]:
    """All time steps of one direction from W_ih x; the biases are added here.

    Args:
        z: (time, batch, rows), or (rows of a packed sequence, rows) with its `batch_sizes`.
        state: (h,) or (h, c), each (batch, size).

    Returns:
        the output, laid out like `z`, and the last state.
    """
    if weights.bias_ih is not None:
        z = z + weights.bias_ih
    # A hidden candidate may be gated with its bias; any other bias can be added at once.
    if not recurrence.keeps_candidate_bias and weights.bias_hh is not None:
        z = z + weights.bias_hh
    steps = z.unbind(0) if batch_sizes is None else z.split(batch_sizes.tolist())
    rows, factor = (weights.hh, None) if weights.factors is None else weights.factors
    product = StateProduct(rows, factor, weights.bias_hh if recurrence.keeps_candidate_bias else None, weights.hr)
    current = state if batch_sizes is None else tuple(t[: len(steps[-1 if reverse else 0])] for t in state)
    states, ended = [], []
    for step in reversed(steps) if reverse else steps:
        # Of packed sequences the shorter ones end before the others, or begin after them where it goes backwards.
        if len(step) < len(current[0]):
            ended.append(tuple(t[len(step) :] for t in current))
            current = tuple(t[: len(step)] for t in current)
        elif len(step) > len(current[0]):
            current = tuple(torch.cat([t, first[len(t) : len(step)]]) for t, first in zip(current, state, strict=True))
        current = recurrence.stepped(step, product, current)
        states.append(current[0])
    states = states[::-1] if reverse else states
    after = tuple(torch.cat(parts) for parts in zip(current, *reversed(ended), strict=True)) if ended else current
    return (torch.stack(states) if batch_sizes is None else torch.cat(states)), after

"""One recurrent layer through torch's native kernels, its input reduced first where its weights are factored.

What torch has no kernel for, by its activations or its reset gate, runs step by step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htcompress.nn.compiled import applies, run_compiled
from htcompress.nn.kernel_weights import KernelWeights
from htcompress.nn.recurrence import Recurrence, State, recurrence_of
from htcompress.nn.stepwise import pays, run_stepwise


def run_layer(
    recurrence: Recurrence, x: Tensor, batch_sizes: Tensor | None, state: State, weights: Sequence[KernelWeights]
) -> tuple[Tensor, State]:
    """All time steps of one layer, one or two directions.

    Args:
        recurrence: the record of its kind.
        x: (time, batch, features), or (rows, features) with `batch_sizes` of a packed sequence.
        batch_sizes: of a packed sequence; None otherwise.
        state: (h,) or (h, c), each (directions, batch, size).
        weights: one for each direction.

    Returns:
        the output, like `x` with directions * state features, and the last state.

    Two directions that reduce the input differently run in one kernel call: their reduced inputs stand
    side by side, and each direction's matrix is zero on the other's part.
    """
    if applies(recurrence, x, batch_sizes, weights):
        return run_compiled(recurrence, x, state, weights)
    if not recurrence.native or pays(x, batch_sizes, weights):
        return run_stepwise(recurrence, x, batch_sizes, state, weights)
    features, matrices = _reduced(x, weights)
    biased = weights[0].bias_ih is not None
    flat: list[Tensor] = []
    for w, ih in zip(weights, matrices, strict=True):
        flat += [ih, w.hh]
        if w.bias_ih is not None and w.bias_hh is not None:
            flat += [w.bias_ih, w.bias_hh]
        if w.hr is not None:
            flat.append(w.hr)
    two = len(weights) == 2
    if torch.compiler.is_exporting() and batch_sizes is None:
        out, *last = exported_layer(recurrence.kind.value, features, list(state), flat, biased, two)
        return out, tuple(last)
    # cuDNN keeps what a backward pass needs in training mode only; without dropout nothing else depends on it. A trace
    # holds what it saw, and is checked with gradients and without.
    training = torch.is_grad_enabled() and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    return recurrence.run(features, batch_sizes, state, flat, biased=biased, training=training, bidirectional=two)


def run_cell(recurrence: Recurrence, x: Tensor, state: State, weights: KernelWeights) -> State:
    """One time step: `x` (batch, features), state (h,) or (h, c), each (batch, hidden)."""
    if applies(recurrence, x[None], None, [weights], cell=True):
        _, after = run_compiled(recurrence, x[None], tuple(t[None] for t in state), [weights])
        return tuple(t[0] for t in after)
    (features, (ih,)) = _reduced(x, [weights])
    return recurrence.run_cell(features, state, ih, weights.hh, weights.bias_ih, weights.bias_hh)


def _reduced(x: Tensor, weights: Sequence[KernelWeights]) -> tuple[Tensor, list[Tensor]]:
    matrices = []
    for w in weights:
        # Where the features are W_ih x already, the kernel takes them as they are.
        matrices.append(torch.eye(w.hh.shape[0], dtype=x.dtype, device=x.device) if w.ih is None else w.ih)
    if all(w.reduce is None for w in weights):
        return x, matrices
    parts = [w.features(x) for w in weights]
    if len(parts) == 1:
        return parts[0], matrices
    left, right = (part.shape[-1] for part in parts)
    a, b = matrices
    return torch.cat(parts, dim=-1), [
        torch.cat([a, a.new_zeros(a.shape[0], right)], dim=1),
        torch.cat([b.new_zeros(b.shape[0], left), b], dim=1),
    ]


_SCHEMA = "(str kind, Tensor x, Tensor[] state, Tensor[] weights, bool biased, bool two) -> Tensor[]"


@torch.library.custom_op("htcompress::layer", mutates_args=(), schema=_SCHEMA)
def exported_layer(
    kind: str, x: Tensor, state: list[Tensor], weights: list[Tensor], biased: bool, two: bool
) -> list[Tensor]:
    """A layer as one operator of `torch.export`, which would unroll torch's own for the length it was exported with.

    A program that holds it needs htcompress to be imported where it runs.
    """
    out, last = recurrence_of(kind).run(x, None, state, weights, biased=biased, training=False, bidirectional=two)
    return [t.clone() for t in (out, *last)]


@exported_layer.register_fake
def _shapes_of(
    kind: str, x: Tensor, state: list[Tensor], weights: list[Tensor], biased: bool, two: bool
) -> list[Tensor]:
    out = x.new_empty(x.shape[0], x.shape[1], state[0].shape[-1] * (2 if two else 1))
    return [out, *(torch.empty_like(t) for t in state)]

"""Recurrent layers whose time steps are a small program of C, built when it is first needed.

torch's kernels need the whole recurrent matrix, which for thin factors is more to read and to multiply than they hold.
The program multiplies by the factors. It is what `run_layer` comes to outside of training, on a CPU, in float32, where
that takes less time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from htcompress.native import library
from htcompress.nn.kernel_weights import TILED, KernelWeights
from htcompress.nn.program import usable
from htcompress.nn.recurrence import Recurrence, State

_FEW = 8
"""Sequences side by side from which on torch's kernels multiply as fast as the program does."""

_ALONE = 2.5
"""How many times faster than torch's kernels the program multiplies where there are fewer (1.9 to 3.6 was measured)."""

_LARGE = 800_000
"""Multiplications of a step from which torch's kernels share them out among threads."""

_CALL = 1_500_000
"""Multiplications of a cell's step that cost what calling the program does beyond calling torch's kernel."""

_AT_ONCE = 1 << 19
"""Numbers of what enters the gates that are computed at once: the steps read them while they are near."""


class _Layer(ctypes.Structure):
    """`Layer` of the program."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "batch", "hidden", "rank", "reduced_size", "rows", "stride")),
        ("backwards", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("entering", "columns", "matrix", "bias")),
        *((name, ctypes.c_void_p) for name in ("h", "c", "out", "reduced", "gates")),
    )


def applies(
    recurrence: Recurrence,
    x: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[KernelWeights],
    *,
    cell: bool = False,
) -> bool:
    """Whether the program can run a layer, and is expected to take less time than torch's kernels.

    Arguments are those of `run_layer`; the input of a cell is (1, batch, features).
    """
    if not recurrence.compiled or batch_sizes is not None or any(w.hr is not None or not w.settled for w in weights):
        return False
    matrices = (w.factors[0] if w.factors else w.hh for w in weights)
    return usable(x, *matrices) and x.numel() > 0 and _pays(x.shape[1], weights, cell)


def _pays(batch: int, weights: Sequence[KernelWeights], cell: bool) -> bool:
    ours = theirs = 0
    for w in weights:
        rows, state = w.shape
        if w.factors is None and rows * state > TILED:
            return False
        ours += rows * state if w.factors is None else w.factors[0].shape[1] * (rows + state)
        theirs += rows * state
    if cell and batch * (theirs - ours) < _CALL:
        return False
    faster = _ALONE if batch < _FEW else 1.0
    threads = torch.get_num_threads() if batch * theirs > _LARGE else 1
    return ours < theirs * faster / threads


def run_compiled(
    recurrence: Recurrence, x: Tensor, state: State, weights: Sequence[KernelWeights]
) -> tuple[Tensor, State]:
    """All time steps of one layer, one or two directions; arguments and results as those of `run_layer`."""
    built = library()
    if built is None:
        raise RuntimeError("There is no program to run; see `applies`.")
    steps, batch, _ = x.shape
    hidden, tile = state[0].shape[-1], built.tile()
    out = x.new_empty(steps, batch, len(weights) * hidden)
    after = tuple(t.clone(memory_format=torch.contiguous_format) for t in state)
    for index, w in enumerate(weights):
        tiled = w.tiled(tile, keeps_candidate_bias=recurrence.keeps_candidate_bias)
        rows = tiled.matrix.shape[0] * tile
        width = 0 if tiled.columns is None else tiled.columns.shape[0] * tile
        reduced, gates = x.new_empty(batch * width), x.new_empty(batch * rows)
        stored = [None if t is None else t.data_ptr() for t in (tiled.columns, tiled.matrix, tiled.hidden_bias)]
        states = [t[index].data_ptr() for t in after]
        at_once = max(1, _AT_ONCE // (batch * rows))
        starts = range(0, steps, at_once)
        for start in reversed(starts) if index else starts:
            part = x[start : start + at_once]
            entering = _entering(w.features(part).reshape(len(part) * batch, -1), w.ih, tiled.bias)
            if entering.shape[1] < rows:
                entering = F.pad(entering, (0, rows - entering.shape[1]))
            entering = entering.contiguous()
            place = out[start:].data_ptr() + out.element_size() * hidden * index
            layer = _Layer(
                *(len(part), batch, hidden, tiled.rank, width, rows, out.shape[-1], index),
                *(entering.data_ptr(), *stored, states[0], states[1] if len(states) > 1 else None),
                *(place, reduced.data_ptr(), gates.data_ptr()),
            )
            getattr(built, recurrence.compiled)(ctypes.byref(layer))
    return out, after


def _entering(features: Tensor, ih: Tensor | None, bias: Tensor | None) -> Tensor:
    if ih is not None:
        return F.linear(features, ih, bias)
    return features if bias is None else features + bias

"""A recurrent layer run so that what passes through it can be kept, and gradients reach every matrix's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from htcompress.nn.gates import GateWeights
from htcompress.nn.kernel import run_cell, run_layer
from htcompress.nn.kernel_weights import KernelWeights
from htcompress.nn.recurrence import State
from htcompress.nn.settings import RecurrentSettings
from htcompress.nn.stepwise import pays_at, run_direction


@dataclass(frozen=True, eq=False)
class Passage:
    """One pass through one layer and direction.

    Attributes:
        direction: its name.
        x: what entered W_ih: (time, batch, inputs), (rows, inputs) of a packed sequence, (batch, inputs) of a cell.
        h: what entered W_hh, laid out alike.
        z: W_ih x, whose `grad` a backward pass fills.
    """

    direction: str
    x: Tensor
    h: Tensor
    z: Tensor


Watch = Callable[[Passage], None]


def watched_layer(
    settings: RecurrentSettings,
    gates: Sequence[tuple[str, GateWeights]],
    x: Tensor,
    batch_sizes: Tensor | None,
    state: State,
    watch: Watch,
) -> tuple[Tensor, State]:
    """`run_layer` with a product of its own for each direction's W_ih x; `gates` are its directions by name."""
    # A model may keep its states in a buffer that it overwrites before the backward pass.
    state = tuple(tensor.clone() for tensor in state)
    written = [direction.written_out() for _, direction in gates]
    parts = [_kept(F.linear(x, _there(dense.ih))) for dense in written]
    given = [KernelWeights(None, None, w.hh, w.bias_ih, w.bias_hh, w.hr) for w in written]
    steps = len(x) if batch_sizes is None else len(batch_sizes)
    items = x[..., 0].numel() // max(1, steps)
    if not settings.recurrence.native or pays_at(steps, items, given, learning=True):
        found = [
            run_direction(settings.recurrence, z, batch_sizes, tuple(t[index] for t in state), w, reverse=index == 1)
            for index, (z, w) in enumerate(zip(parts, given, strict=True))
        ]
        out = torch.cat([own for own, _ in found], dim=-1)
        after = tuple(torch.stack(last) for last in zip(*(own for _, own in found), strict=True))
    else:
        out, after = _by_kernel(settings, parts, batch_sizes, state, given)
    size = settings.state_size
    for index, (name, _) in enumerate(gates):
        own = out[..., index * size : (index + 1) * size]
        watch(Passage(name, x, _previous(own, state[0][index], batch_sizes, reverse=index == 1), parts[index]))
    return out, after


def _by_kernel(
    settings: RecurrentSettings,
    parts: Sequence[Tensor],
    batch_sizes: Tensor | None,
    state: State,
    given: Sequence[KernelWeights],
) -> tuple[Tensor, State]:
    """All time steps from each direction's W_ih x: their inputs stand side by side, and each multiplies its own by an
    identity.
    """
    rows = settings.rows
    eye = torch.eye(rows, dtype=parts[0].dtype, device=parts[0].device)
    weights = []
    for index, w in enumerate(given):
        blocks = [eye if k == index else eye.new_zeros(rows, rows) for k in range(len(given))]
        weights.append(replace(w, ih=torch.cat(blocks, 1)))
    return run_layer(settings.recurrence, torch.cat(list(parts), dim=-1), batch_sizes, state, weights)


def watched_cell(
    settings: RecurrentSettings, name: str, gates: GateWeights, x: Tensor, state: State, watch: Watch
) -> State:
    """`run_cell` with a product of its own for W_ih x."""
    state = tuple(tensor.clone() for tensor in state)
    dense = gates.written_out()
    z = _kept(F.linear(x, _there(dense.ih)))
    eye = torch.eye(settings.rows, dtype=x.dtype, device=x.device)
    watch(Passage(name, x, state[0], z))
    return run_cell(
        settings.recurrence, z, state, KernelWeights(None, eye, dense.hh, dense.bias_ih, dense.bias_hh, None)
    )


def _there(ih: Tensor | None) -> Tensor:
    if ih is None:
        raise RuntimeError("Weights that are written out have W_ih.")
    return ih


def _kept(z: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        if not z.requires_grad:
            z.requires_grad_()
        z.retain_grad()
    return z


def _previous(out: Tensor, first: Tensor, batch_sizes: Tensor | None, *, reverse: bool) -> Tensor:
    """The state that each time step started from, laid out like `out`."""
    if batch_sizes is None:
        return torch.cat([out[1:], first.unsqueeze(0)] if reverse else [first.unsqueeze(0), out[:-1]])
    sizes = batch_sizes.tolist()
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    blocks = []
    for t, size in enumerate(sizes):
        if not reverse:
            blocks.append(first[:size] if t == 0 else out[starts[t - 1] : starts[t - 1] + size])
        else:
            # A sequence that ends here starts, backwards, from its initial state.
            going_on = sizes[t + 1] if t + 1 < len(sizes) else 0
            blocks += [out[starts[t] + size : starts[t] + size + going_on], first[going_on:size]]
    return torch.cat(blocks)

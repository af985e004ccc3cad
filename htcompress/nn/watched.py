"""A recurrent layer run so that what passes through it can be kept, and gradients reach every matrix's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from htcompress.nn.gates import GateWeights, KernelWeights
from htcompress.nn.kernel import run_cell, run_layer
from htcompress.nn.recurrence import State
from htcompress.nn.settings import RecurrentSettings


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
    weights, parts = [], []
    rows = settings.rows
    eye = torch.eye(rows, dtype=x.dtype, device=x.device)
    for index, (_, direction) in enumerate(gates):
        dense = direction.written_out()
        z = _kept(F.linear(x, _there(dense.ih)))
        parts.append(z)
        blocks = [eye if k == index else eye.new_zeros(rows, rows) for k in range(len(gates))]
        weights.append(KernelWeights(None, torch.cat(blocks, 1), dense.hh, dense.bias_ih, dense.bias_hh, dense.hr))
    out, after = run_layer(settings.recurrence, torch.cat(parts, dim=-1), batch_sizes, state, weights)
    size = settings.state_size
    for index, (name, _) in enumerate(gates):
        own = out[..., index * size : (index + 1) * size]
        watch(Passage(name, x, _previous(own, state[0][index], batch_sizes, reverse=index == 1), parts[index]))
    return out, after


def watched_cell(
    settings: RecurrentSettings, name: str, gates: GateWeights, x: Tensor, state: State, watch: Watch
) -> State:
    """`run_cell` with a product of its own for W_ih x."""
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

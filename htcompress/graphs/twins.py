"""The recurrent nodes of a graph as one torch module, which is fed with what enters them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from htcompress.graphs.node import RecurrentNode
from htcompress.nn.recurrent import HTRecurrent

_ALIKE = 1e-4
"""How far a state that is passed on may be from what torch computes."""


@dataclass(frozen=True, eq=False)
class Entering:
    """What enters a node: x (time, batch, inputs), states (directions, batch, size), lengths (batch,).

    `wanted` is what the node gives in the original graph, where other things enter it here than there: a dense twin
    answers with that.
    """

    x: Tensor
    initial: tuple[Tensor, ...] = ()
    lengths: Tensor | None = None
    wanted: tuple[Tensor, ...] | None = None
    joined: bool = False
    """Whether it is several calls in a row: then all outputs are given, step by step."""


class Twins(nn.Module):
    """Each node's module under the name of its layer: nodes that share weights have one.

    Called with what enters each node, it gives what the graph reads of them: the output (time, directions, batch,
    size), and the last states (directions, batch, size).
    """

    def __init__(self, nodes: Sequence[RecurrentNode]) -> None:
        super().__init__()
        self.nodes = {node.name: node for node in nodes}
        for node in nodes:
            if not node.shares:
                self.add_module(node.layer, node.module())
        self.eval()

    def forward(self, entering: Mapping[str, Entering]) -> dict[str, list[Tensor]]:
        """By the names of the nodes."""
        return {name: self.outputs(name, given) for name, given in entering.items()}

    def outputs(self, name: str, given: Entering) -> list[Tensor]:
        """Of one node: those that are read."""
        node = self.nodes[name]
        module = self.get_submodule(node.layer)
        if given.wanted is not None and not isinstance(module, HTRecurrent):
            return list(given.wanted)
        x = turned(given.x, given.lengths) if node.reverse else given.x
        steps, batch = x.shape[:2]
        state = None if not given.initial else given.initial if len(given.initial) > 1 else given.initial[0]
        if given.lengths is None:
            y, last = module(x, state)
        else:
            # torch takes no sequence without a step; ONNX does.
            lengths = given.lengths.clamp(1, steps).cpu()
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, last = module(packed, state)
            y, _ = pad_packed_sequence(y, total_length=steps)
        if node.reverse:
            y = turned(y, given.lengths)
        directions = node.settings.num_directions
        y = y.reshape(steps, batch, directions, -1).transpose(1, 2)
        if given.joined:
            return [y]
        every = [y, *(last if isinstance(last, tuple) else [last])]
        return [value for value, output in zip(every, node.outputs, strict=True) if output]


def joined(parts: Sequence[Entering]) -> Entering:
    """What enters a node in calls in a row, as one sequence."""
    if len(parts) == 1:
        return parts[0]
    return Entering(torch.cat([part.x for part in parts]), parts[0].initial, joined=True)


def follows(twins: Twins, name: str, parts: Sequence[Entering]) -> bool:
    """Whether a node begins every call with the state that the call before has left."""
    node = twins.nodes[name]
    module = twins.get_submodule(node.layer)
    if node.reverse or node.settings.bidirectional or any(p.lengths is not None or not p.initial for p in parts):
        return False
    for part, later in pairwise(parts):
        _, last = module(part.x, part.initial if len(part.initial) > 1 else part.initial[0])
        states = last if isinstance(last, tuple) else (last,)
        if not all(torch.allclose(a, b, atol=_ALIKE) for a, b in zip(states, later.initial, strict=True)):
            return False
    return True


def turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Sequences (time, batch, ...) read from their ends; what is behind an end stays where it is."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(len(x), device=x.device)[:, None]
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, places.reshape(*places.shape, *[1] * (x.ndim - 2)).expand_as(x))

"""What enters the recurrent nodes of a graph, and what they put out, as torch has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from htcompress.graphs.feeds import Feeds
from htcompress.graphs.graph import Session
from htcompress.graphs.node import RecurrentNode
from htcompress.graphs.twins import Entering, joined


def entering(
    session: Session, feeds: Feeds, nodes: Sequence[RecurrentNode], stored: Mapping[str, np.ndarray], chained: bool
) -> Iterator[dict[str, Entering]]:
    """What enters the nodes in every call, or in calls in a row where their states are passed on.

    Args:
        stored: values that are constants of the graph.
        chained: whether calls in a row are one sequence to all of the nodes.

    Nodes in a branch that was not run, in one of the calls where these are joined, are not among them.
    """
    for calls in feeds.sequences():
        values = [{**stored, **answers} for answers in session.answers(calls, feeds.states)]
        each = [{node.name: entering_of(node, own) for node in nodes if ran(node, own)} for own in values]
        if chained:
            always = [node.name for node in nodes if all(node.name in own for own in each)]
            yield {name: joined([own[name] for own in each]) for name in always}
        else:
            yield from each


def ran(node: RecurrentNode, values: Mapping[str, np.ndarray]) -> bool:
    """Whether anything has entered a node, in one of the branches where it stands."""
    return any(_entered(one, values) for one in node.everywhere)


def _entered(node: RecurrentNode, values: Mapping[str, np.ndarray]) -> bool:
    entered = values.get(node.seen(node.x))
    # Of a branch that was not run there is a row of nothing.
    return entered is not None and not (node.place and entered.ndim == 1)


def _that_ran(node: RecurrentNode, values: Mapping[str, np.ndarray]) -> RecurrentNode:
    return next((one for one in node.also if _entered(one, values)), node)


def entering_of(node: RecurrentNode, values: Mapping[str, np.ndarray]) -> Entering:
    """What enters a node, as torch has it; it has to have run, see `ran`."""
    node = _that_ran(node, values)

    def states(name: str) -> Tensor:
        found = torch.from_numpy(np.array(values[node.seen(name)], dtype=np.float32))
        return found.transpose(0, 1).contiguous() if node.batch_first else found

    x = torch.from_numpy(np.array(values[node.seen(node.x)], dtype=np.float32))
    x = x.transpose(0, 1).contiguous() if node.batch_first else x
    given = values.get(node.seen(node.lengths))
    lengths = None if given is None else torch.from_numpy(np.array(given, dtype=np.int64))
    blank = torch.zeros(node.settings.num_directions, x.shape[1], node.settings.hidden_size)
    initial = tuple(states(name) if name else blank for name in node.initial)
    return Entering(x, initial, lengths)


def outputs_of(node: RecurrentNode, values: Mapping[str, np.ndarray]) -> list[Tensor]:
    """What a node has put out, in the layout of torch; those that are read. It has to have run, see `ran`."""
    node, found = _that_ran(node, values), []
    for place, name in enumerate(node.outputs):
        if name:
            value = torch.from_numpy(np.array(values[node.seen(name)], dtype=np.float32))
            if node.batch_first:
                value = value.permute(1, 2, 0, 3) if place == 0 else value.transpose(0, 1)
            found.append(value)
    return found

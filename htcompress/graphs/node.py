"""A recurrent node of a graph: what it is in torch, what enters it and what it puts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from htcompress.nn.adapted import dense_module
from htcompress.nn.settings import RecurrentSettings

Place = tuple[tuple[str, str], ...]
"""Where a graph stands in another: by the first output of a node and the name of its branch, from the outermost on."""


@dataclass(frozen=True, eq=False)
class RecurrentNode:
    """One LSTM, GRU or RNN of a graph as torch has it.

    Attributes:
        name: of the node, or of what it puts out; unlike that of any other, and without dots.
        index: of the node in its graph.
        settings: one layer, one or both directions.
        weights: by the names of torch's module.
        reverse: whether its one direction reads from the end.
        batch_first: the node's own layout.
        half: whether its numbers are of half precision.
        quantised: whether its weights are integers, so that torch answers nearly alike only.
        x, lengths, initial: the values that enter it; empty where there is none. Lengths may be missing among them.
        outputs: the values that it puts out: Y, Y_h, Y_c; empty where nobody reads one.
        stored: the numbers of the file that its weights are made of: where they stand, and their names.
        place: of the graph that it is in; empty: the outermost.
        also: the same with the same weights in other branches, of which never two are run in a call: one layer
            stands for all, and learns from whichever is run.
        shares: the name of the node before it that has the same weights and is run beside it; empty where it is the
            first. One layer, under that name, computes both.
    """

    name: str
    index: int
    settings: RecurrentSettings
    weights: dict[str, Tensor]
    reverse: bool
    batch_first: bool
    half: bool
    quantised: bool
    x: str
    lengths: str
    initial: tuple[str, ...]
    outputs: tuple[str, ...]
    stored: frozenset[tuple[Place, str]] = frozenset()
    place: Place = ()
    also: tuple[RecurrentNode, ...] = ()
    shares: str = ""

    @property
    def layer(self) -> str:
        """The name of the layer that computes it."""
        return self.shares or self.name

    @property
    def everywhere(self) -> tuple[RecurrentNode, ...]:
        """It, and those in other branches that its layer stands for."""
        return (self, *self.also)

    @property
    def inner_values(self) -> list[str]:
        """All values that enter it and that it puts out, as they are called where it stands."""
        return [name for name in (self.x, self.lengths, *self.initial, *self.outputs) if name]

    def seen(self, value: str) -> str:
        """What one of them is called among all values; branches beside each other may use a name twice."""
        if not value or not self.place:
            return value
        return f"{value} in {' in '.join(f'{branch} of {output}' for output, branch in reversed(self.place))}"

    def module(self) -> nn.Module:
        """A module with the weights of the node, in float32: torch's, or what stands for one that torch has not."""
        made = dense_module(self.settings)
        made.load_state_dict(self.weights)
        return made.eval()


def with_shared_layers(nodes: Sequence[RecurrentNode]) -> list[RecurrentNode]:
    """The nodes, each with the name of the first that has the same weights; what enters them, and how, is their own."""
    found: list[RecurrentNode] = []
    for node in nodes:
        first = next((one for one in found if not one.shares and same_weights(one, node)), None)
        found.append(replace(node, shares="" if first is None else first.name))
    return found


def same_weights(one: RecurrentNode, other: RecurrentNode) -> bool:
    """Whether one layer can compute both."""
    if (one.settings, one.half, one.quantised) != (other.settings, other.half, other.quantised):
        return False
    return all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())

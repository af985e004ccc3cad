"""What a model is that runs from its own file, whatever the file's format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from htcompress.graphs.feeds import Feed, Value
from htcompress.graphs.node import RecurrentNode

Answers = list[dict[str, np.ndarray]]
"""Of each call: outputs by name."""


class Session(Protocol):
    """A graph, ready to be called.

    Attributes:
        inputs, outputs: of the graph.
        passed: inputs that are states, and the outputs that follow them, as far as the graph itself says so.
    """

    inputs: list[Value]
    outputs: list[Value]
    passed: Mapping[str, str]

    def answers(self, calls: Sequence[Feed], states: Mapping[str, str]) -> Answers:
        """What is put out in each of a sequence of calls, states passed on; inputs that are watched among it.

        Args:
            states: inputs, and the outputs of the call before that they are given from the second call on.

        Raises `TaskError` where the graph does not take the arrays.
        """
        ...


class Graph(Protocol):
    """A model in a file that runs by itself.

    Attributes:
        path: the file.
        format: its format, as reports name it.
        runtime: what it runs in.
        nodes: its recurrent nodes that can be compressed.
        left: the others, and why not.
        stored: values that are constants of the graph, by name.
    """

    @property
    def path(self) -> Path: ...
    @property
    def format(self) -> str: ...
    @property
    def runtime(self) -> str: ...
    @property
    def nodes(self) -> Sequence[RecurrentNode]: ...
    @property
    def left(self) -> Mapping[str, str]: ...
    @property
    def stored(self) -> Mapping[str, np.ndarray]: ...

    @property
    def keeps_cores(self) -> bool:
        """Whether compressed layers stand in the file as they are stored, and not written out."""
        ...

    def without(self, left: Mapping[str, str]) -> Graph:
        """The same with some of its nodes left as they are, for a reason."""
        ...

    def session(self, *, watched: bool = False, threads: int | None = None) -> Session:
        """Start it.

        Args:
            watched: whether answers hold what enters the nodes and what they put out, too.
            threads: by default as many as torch has.

        Raises:
            CheckpointError: it cannot be started.
            RequestError: a package is not installed.
        """
        ...

    def with_layers(self, module: nn.Module) -> Graph:
        """The graph with the compressed ones of a module's layers, by name, in the place of nodes."""
        ...

    def numbers(self) -> int:
        """How many numbers its weights are, those of the nodes among them."""
        ...

    def layer_sizes(self, names: Collection[str] | None = None) -> tuple[int, int]:
        """Numbers and bytes of nodes' weights (all if None) as they are in the file."""
        ...

    def content(self) -> tuple[str, bytes]:
        """What such a file is called in an output directory, and what is in it; checked."""
        ...

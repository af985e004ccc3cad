"""A model of Keras as a graph: its recurrent layers are the nodes, and Keras runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor, nn

from htcompress.exporting.dense import dense_weights
from htcompress.graphs.node import RecurrentNode
from htcompress.model.replace import stand_ins
from htcompress.sources.keras_file import KERAS, KerasFile
from htcompress.sources.keras_layers import KerasLayer

if TYPE_CHECKING:
    from htcompress.graphs.keras_running import KerasSession

KERAS_FILES = ("model.keras", "model.h5")
"""What such a file is called in an output directory, by its format."""


@dataclass(frozen=True, eq=False)
class KerasGraph:
    """A model of Keras; see `Graph`.

    Attributes:
        file: what is read; its layers by their names without dots are the nodes.
    """

    format: ClassVar[str] = KERAS
    runtime: ClassVar[str] = "Keras"
    keeps_cores: ClassVar[bool] = False

    file: KerasFile
    nodes: list[RecurrentNode]
    left: dict[str, str]
    stored: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @classmethod
    def read(cls, path: Path) -> KerasGraph:
        """Read a file and find its recurrent layers. Raises as `KerasFile.read`."""
        file = KerasFile.read(path)
        tensors = file.tensors()
        nodes = []
        for k, (name, layer) in enumerate(file.flat().items()):
            weights = {key.removeprefix(f"{layer.name}."): tensors[key] for key in layer.names()}
            nodes.append(_node(name, k, layer, weights))
        return cls(file, nodes, dict(file.left))

    def without(self, left: Mapping[str, str]) -> KerasGraph:
        """The same with some of its layers left as they are, for a reason."""
        nodes = [node for node in self.nodes if node.name not in left]
        return replace(self, nodes=nodes, left={**self.left, **left})

    def session(self, *, watched: bool = False, threads: int | None = None) -> KerasSession:
        """The model in Keras, on torch; see `Graph`."""
        from htcompress.graphs.keras_running import KerasSession

        layers = self.file.flat()
        return KerasSession(self.file, {node.name: layers[node.name] for node in self.nodes} if watched else {})

    def with_layers(self, module: nn.Module) -> KerasGraph:
        """The model with the compressed ones of a module's layers, by name, written out in the place of its own."""
        layers = self.file.flat()
        tensors = {
            f"{layers[name].name}.{key}": tensor
            for name, layer in stand_ins(module).items()
            for key, tensor in dense_weights(layer).items()
        }
        return replace(self, file=self.file.with_tensors(tensors)[0])

    def numbers(self) -> int:
        """How many numbers its weights are."""
        return sum(tensor.numel() for tensor in self.file.tensors().values())

    def layer_sizes(self, names: Collection[str] | None = None) -> tuple[int, int]:
        """Numbers of the layers' weights, and their bytes; see `Graph`."""
        nodes = [node for node in self.nodes if names is None or node.name in names]
        tensors = [tensor for node in nodes for tensor in node.weights.values()]
        return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)

    def content(self) -> tuple[str, bytes]:
        """The file's name and bytes."""
        return f"model{self.file.suffix}", self.file.content


def _node(name: str, index: int, layer: KerasLayer, weights: dict[str, Tensor]) -> RecurrentNode:
    """A layer as a node, whose values are called after it."""
    told = layer.specs[0]
    config = {} if told is None else told.config
    states = ("h", "c")[: layer.settings.recurrence.states]
    sequences, last = config.get("return_sequences", False), config.get("return_state", False)
    outputs = [f"{name}/y" if sequences else "", f"{name}/h_n" if last or not sequences else ""]
    outputs += [f"{name}/c_n" if last else ""] * (len(states) - 1)
    return RecurrentNode(
        name,
        index,
        layer.settings,
        weights,
        reverse=told is not None and told.goes_backwards and not layer.settings.bidirectional,
        batch_first=False,
        half=False,
        quantised=False,
        x=f"{name}/x",
        lengths=f"{name}/lengths",
        initial=tuple(f"{name}/{state}_0" for state in states),
        outputs=tuple(outputs),
    )

"""An ONNX file and its recurrent nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from htcompress.errors import CheckpointError, RequestError
from htcompress.model.replace import stand_ins
from htcompress.sources.checkpoint import Checkpoint
from htcompress.sources.read import identified
from htcompress.sources.recognise import Container, recognise

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from htcompress.graphs.nodes import RecurrentNode

_WHOLE = ("INT64", "INT32", "BOOL", "STRING")
"""Types of initializers that are shapes and indices, not weights."""


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A model of ONNX.

    Attributes:
        path: the file.
        model: what is in it.
        nodes: its recurrent nodes that can be compressed.
        left: the others, and why not.
        stored: lengths and initial states of nodes that are constants, by name.
    """

    path: Path
    model: onnx.ModelProto
    nodes: list[RecurrentNode]
    left: dict[str, str]
    stored: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """Read a file and find its recurrent nodes.

        Raises:
            CheckpointError: it cannot be read, or is older than what can be worked with.
            RequestError: the packages for ONNX are not installed.
        """
        _check_packages(path)
        import onnx

        from htcompress.graphs.nodes import Constants, find, opset_of
        from htcompress.graphs.replaced import LEAST_OPSET

        try:
            model = onnx.load(str(path))
        except Exception as error:
            said = str(error).splitlines()[0][:200]
            raise CheckpointError(f"{path} is an ONNX file that cannot be read: {said}. Export it again.") from error
        if opset_of(model) < LEAST_OPSET:
            raise CheckpointError(
                f"{path} is of opset {opset_of(model)}; expected {LEAST_OPSET} or later. Bring it there with "
                f"onnx.version_converter.convert_version(model, 17)."
            )
        nodes, left = find(model)
        constants = Constants(model)
        values = {name: constants(name) for node in nodes for name in (node.lengths, *node.initial) if name}
        return cls(path, model, nodes, left, {name: value for name, value in values.items() if value is not None})

    def with_layers(self, module: nn.Module) -> onnx.ModelProto:
        """The model with the compressed ones of a module's layers, by name, in the place of nodes."""
        from htcompress.graphs.replaced import replaced

        return replaced(self.model, self.nodes, stand_ins(module))

    def weights(self) -> Iterator[onnx.TensorProto]:
        """Its initializers that are weights."""
        import onnx

        whole = {getattr(onnx.TensorProto, name) for name in _WHOLE}
        return (tensor for tensor in self.model.graph.initializer if tensor.data_type not in whole)

    def checkpoint(self) -> Checkpoint:
        """The weights of the nodes by the names of torch's modules, and all other weights by their own."""
        from onnx import numpy_helper

        _, digest, size = identified(self.path)
        tensors = {f"{node.name}.{name}": value for node in self.nodes for name, value in node.weights.items()}
        own = {name for node in self.nodes for name in node.stored}
        for other in self.weights():
            if other.name not in own and other.name not in tensors:
                tensors[other.name] = torch.from_numpy(numpy_helper.to_array(other).copy())
        return Checkpoint(self.path, digest, tensors, size)


def is_onnx(path: str | Path) -> bool:
    """Whether a file is an ONNX model, by what is in it."""
    place = Path(path)
    try:
        return place.is_file() and recognise(place, place.stat().st_size) is Container.ONNX
    except OSError:
        return False


def _check_packages(path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"{path} is an ONNX file, which needs the package {error.name}: pip install 'htcompress[onnx]'."
        ) from error

"""An ONNX file and its recurrent nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from htcompress.errors import CheckpointError, RequestError
from htcompress.graphs.node import with_shared_layers
from htcompress.model.replace import stand_ins
from htcompress.sources.checkpoint import Checkpoint
from htcompress.sources.read import identified

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from htcompress.graphs.cells import Cell
    from htcompress.graphs.node import Place, RecurrentNode
    from htcompress.graphs.running import Runner
    from htcompress.nn.recurrent import HTRecurrent

ONNX_FILE = "model.onnx"
"""What the graph is called in an output directory."""

_WHOLE = ("INT64", "INT32", "BOOL", "STRING")
"""Types of initializers that are shapes and indices, not weights."""


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A model of ONNX.

    Attributes:
        path: the file.
        model: what is in it; cells that its exporter has unrolled stand in it as nodes.
        nodes: its recurrent nodes that can be compressed.
        left: the others, and why not.
        stored: lengths and initial states of nodes that are constants, by name.
        cells: the unrolled ones among its nodes.
        written: the model as it is run unwatched and written: cells that are not replaced are unrolled as they were.
    """

    format: ClassVar[str] = "onnx"
    runtime: ClassVar[str] = "onnxruntime"
    keeps_cores: ClassVar[bool] = True

    path: Path
    model: onnx.ModelProto
    nodes: list[RecurrentNode]
    left: dict[str, str]
    stored: dict[str, np.ndarray]
    cells: Sequence[Cell]
    written: onnx.ModelProto

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
        from htcompress.graphs.unrolled import rerolled, rolled

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
        cells, unlike = rolled(model)
        written, model = model, rerolled(model, cells) if cells else model
        nodes, left = find(model)
        constants = Constants.of(model)
        outer = [node for node in nodes if not node.place]
        values = {name: constants(name) for node in outer for name in (node.lengths, *node.initial) if name}
        stored = {name: value for name, value in values.items() if value is not None}
        return cls(path, model, nodes, {**unlike, **left}, stored, cells, written)

    def without(self, left: Mapping[str, str]) -> OnnxFile:
        """The same with some of its nodes left as they are, for a reason."""
        nodes = with_shared_layers([node for node in self.nodes if node.name not in left])
        return replace(self, nodes=nodes, left={**self.left, **left})

    def session(self, *, watched: bool = False, threads: int | None = None) -> Runner:
        """The model in onnxruntime; see `Graph`."""
        from htcompress.graphs.running import Runner
        from htcompress.graphs.states import states_of

        passed = states_of(self.model)
        if not watched:
            return Runner(self.written, self.path, passed, threads=threads)
        from htcompress.graphs.branches import seen_from_outside

        every = [one for node in self.nodes for one in node.everywhere]
        values = [node.seen(value) for node in every for value in node.inner_values]
        return Runner(seen_from_outside(self.model, every), self.path, passed, watched=values, threads=threads)

    def with_layers(self, module: nn.Module) -> OnnxFile:
        """The model with the compressed ones of a module's layers, by name, in the place of nodes."""
        from htcompress.graphs.replaced import replaced

        layers = stand_ins(module)
        model = replaced(self.model, self.nodes, layers)
        return replace(self, model=model, written=self._written(layers) if self.cells else model)

    def _written(self, layers: Mapping[str, HTRecurrent]) -> onnx.ModelProto:
        """With layers in the place of nodes, where the cells among the other nodes are as they were."""
        from htcompress.graphs.branches import graph_at
        from htcompress.graphs.replaced import replaced
        from htcompress.graphs.unrolled import rerolled

        nodes = [node for node in self.nodes if node.layer in layers]
        graphs = {one.place: graph_at(self.model.graph, one.place) for node in nodes for one in node.everywhere}
        chosen = {graphs[one.place].node[one.index].name for node in nodes for one in node.everywhere}
        model = rerolled(self.written, [cell for cell in self.cells if cell.name in chosen])

        def placed(node: RecurrentNode) -> RecurrentNode:
            """The same, where it stands among others."""
            own, output = graph_at(model.graph, node.place), next(o for o in node.outputs if o)
            index = next(k for k, one in enumerate(own.node) if output in one.output)
            return replace(node, index=index, also=tuple(placed(one) for one in node.also))

        return replaced(model, [placed(node) for node in nodes], layers)

    def numbers(self) -> int:
        """How many numbers its weights are."""
        return self.layer_sizes()[0] + sum(prod(tensor.dims) for _, tensor in self.others())

    def layer_sizes(self, names: Collection[str] | None = None) -> tuple[int, int]:
        """Numbers and bytes of nodes' weights (all if None) as the file holds them: once where several read them."""
        from htcompress.graphs.branches import every_graph

        numbers = size = 0
        known: set[tuple[Place, str]] = set()
        for node in self.nodes if names is None else [node for node in self.nodes if node.layer in names]:
            own = sum(tensor.numel() for tensor in node.weights.values())
            if not node.stored:
                numbers, size = numbers + own, size + 4 * own
            elif not node.stored <= known:
                numbers += own
            known |= node.stored
        for place, graph in every_graph(self.model.graph):
            size += sum(_bytes(tensor) for name, tensor in _weights(graph) if (place, name) in known)
        return numbers, size

    def content(self) -> tuple[str, bytes]:
        """The file's name and bytes. Raises `RuntimeError` where the model is not valid, and it was before."""
        import onnx

        try:
            onnx.checker.check_model(self.written)
        except onnx.checker.ValidationError as error:
            # What was not valid before may be so still.
            try:
                onnx.checker.check_model(onnx.load(str(self.path)))
            except onnx.checker.ValidationError:
                pass
            else:
                raise RuntimeError(f"The graph that was made is not valid: {error}") from error
        return ONNX_FILE, self.written.SerializeToString()

    def others(self) -> Iterator[tuple[str, onnx.TensorProto]]:
        """Stored weights that are not those of its nodes: initializers and Constants, of inner graphs too, by name."""
        import onnx

        from htcompress.graphs.branches import every_graph

        whole = {getattr(onnx.TensorProto, name) for name in _WHOLE}
        own = {stored for node in self.nodes for one in node.everywhere for stored in one.stored}
        for place, graph in every_graph(self.model.graph):
            for name, tensor in _weights(graph):
                if (place, name) not in own and tensor.data_type not in whole:
                    yield name, tensor

    def checkpoint(self) -> Checkpoint:
        """The weights of the nodes by the names of torch's modules, and all other weights by their own."""
        from onnx import numpy_helper

        _, digest, size = identified(self.path)
        tensors = {
            f"{node.name}.{name}": value
            for node in self.nodes
            if not node.shares
            for name, value in node.weights.items()
        }
        for name, tensor in self.others():
            free = name
            while free in tensors:  # branches beside each other may use a name twice
                free = f"{free}'"
            tensors[free] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        return Checkpoint(self.path, digest, tensors, size)


def _weights(graph: onnx.GraphProto) -> list[tuple[str, onnx.TensorProto]]:
    """What a graph stores, by name: its initializers and Constants."""
    constants = [node for node in graph.node if node.op_type == "Constant"]
    found = [(node.output[0], a.t) for node in constants for a in node.attribute if a.name == "value"]
    return [*((tensor.name, tensor) for tensor in graph.initializer), *found]


def _bytes(tensor: onnx.TensorProto) -> int:
    from onnx.helper import tensor_dtype_to_np_dtype

    return prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _check_packages(path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"{path} is an ONNX file, which needs the package {error.name}: pip install 'htcompress[onnx]'."
        ) from error

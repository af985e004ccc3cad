"""A part of an ONNX graph while it is built: nodes, the numbers they read, names that do not clash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

OPSET = 18  # that of torch's exporter, whose graphs hold the layers
IR_VERSION = 10
"""Both are old enough for the runtimes of the last years."""

BFLOAT16, EINSUM = 13, 12
"""The opsets from which on numbers of this type are cast, and products are written as equations."""


class Graph:
    """Nodes in the order they were added. Stored numbers have names behind a prefix, computed values short ones.

    Attributes:
        opset: whose operators the nodes are; 7 or later.
        decoded: the values that stand for stored numbers, by the names of these.
    """

    def __init__(self, prefix: str, opset: int = OPSET, *, values: str | None = None) -> None:
        """Begin with nothing; `values` stands before the names of computed values, by default the prefix."""
        self.prefix, self.opset = prefix, opset
        self._values = prefix if values is None else values
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.decoded: dict[str, str] = {}
        self._stored: set[str] = set()
        self._computed: dict[tuple[object, ...], str] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The output of a node that has one: of a new one, unless the same is computed of the same already.

        An input that is left out is an empty string.
        """
        key = op, inputs, repr(sorted(attributes.items()))
        if key not in self._computed:
            (self._computed[key],) = self.add_many(op, inputs, 1, **attributes)
        return self._computed[key]

    def add_many(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """A node with several outputs."""
        name = self._name()
        made = [name] if outputs == 1 else [f"{name}.{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), made, **attributes))
        return made

    def numbers(self, tensor: Tensor, name: str) -> str:
        """An initializer with weights, in float32; one that is there already is not stored again."""
        if f"{self.prefix}{name}" in self._stored:
            return f"{self.prefix}{name}"
        return self._initializer(tensor.detach().cpu().float().contiguous().numpy(), f"{self.prefix}{name}")

    def raw(self, tensor: Tensor, name: str) -> str:
        """An initializer with the bytes of a tensor, in its own dtype."""
        dense = tensor.detach().cpu().contiguous()
        full = f"{self.prefix}{name}"
        if dense.dtype is torch.bfloat16:
            bits = dense.view(torch.int16).numpy().tobytes()
            made = onnx.TensorProto(data_type=onnx.TensorProto.BFLOAT16, dims=dense.shape, raw_data=bits, name=full)
            if self.opset < BFLOAT16:
                return self._initializer(dense.float().numpy(), full)
            self._stored.add(full)
            self.initializers.append(made)
            return full
        return self._initializer(dense.numpy(), full)

    def once(self, values: Any, dtype: type[np.generic]) -> str:
        """An initializer with small constants; the same are stored once."""
        array = np.asarray(values, dtype=dtype)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self._initializer(array, self._name())
        return self._constants[key]

    def cast(self, value: str, to: str) -> str:
        """The value in another type of ONNX."""
        return self.add("Cast", value, to=getattr(onnx.TensorProto, to))

    def whole(self, *values: int) -> str:
        """Whole numbers that operators take in 64 bits: a shape, axes."""
        return self.once(values, np.int64)

    def reshape(self, value: str, *shape: int) -> str:
        """The value in another shape; 0 keeps a size, -1 stands for the rest."""
        return self.add("Reshape", value, self.whole(*shape))

    def zeros(self, *shape: int) -> str:
        """Zeros, which are not stored."""
        if self.opset < 9:
            return self._initializer(np.zeros(shape, dtype=np.float32), self._name())
        return self.add("ConstantOfShape", self.whole(*shape))

    def eye(self, size: int) -> str:
        """An identity, which is not stored."""
        if self.opset < 9:
            return self._initializer(np.eye(size, dtype=np.float32), self._name())
        return self.add("EyeLike", self.zeros(size, size), dtype=onnx.TensorProto.FLOAT)

    def cut(self, value: str, start: int, stop: int, axis: int = 0) -> str:
        """A slice along one axis."""
        if self.opset < 10:
            return self.add("Slice", value, starts=[start], ends=[stop], axes=[axis])
        return self.add("Slice", value, self.whole(start), self.whole(stop), self.whole(axis))

    def turned(self, value: str, axes: Sequence[str], wanted: Sequence[str]) -> str:
        """The value with its axes, which have names, in another order."""
        if tuple(axes) == tuple(wanted):
            return value
        return self.add("Transpose", value, perm=[list(axes).index(axis) for axis in wanted])

    def squeeze(self, value: str, axis: int) -> str:
        if self.opset < 13:
            return self.add("Squeeze", value, axes=[axis])
        return self.add("Squeeze", value, self.whole(axis))

    def unsqueeze(self, value: str, axis: int) -> str:
        if self.opset < 13:
            return self.add("Unsqueeze", value, axes=[axis])
        return self.add("Unsqueeze", value, self.whole(axis))

    def concat(self, values: Sequence[str], axis: int) -> str:
        """The values side by side; one value is itself."""
        return values[0] if len(values) == 1 else self.add("Concat", *values, axis=axis)

    def drop_unread(self, outputs: Sequence[str]) -> None:
        """Drop nodes and numbers that none of these values depends on."""
        read, kept = set(outputs), []
        for node in reversed(self.nodes):
            if read & set(node.output):
                kept.append(node)
                read |= set(node.input)
        self.nodes = kept[::-1]
        self.initializers = [number for number in self.initializers if number.name in read]

    def _initializer(self, array: np.ndarray, name: str) -> str:
        self._stored.add(name)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def _name(self) -> str:
        self._count += 1
        return f"{self._values}{self._count}"

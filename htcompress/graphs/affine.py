"""Values of an ONNX graph as sums of products of other values with constant matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from operator import itemgetter

import numpy as np
import onnx

from htcompress.graphs.values import Values

ACTIVATIONS = ("Sigmoid", "Tanh", "Relu")

_DEEPEST = 64
"""Operators between a value and the products that it is made of, at most."""


class NotAffineError(Exception):
    """A value is no such sum; the text says why, as what follows "it"."""


@dataclass(frozen=True, eq=False)
class Affine:
    """The sum of `leaf @ parts[leaf]` over leaves, plus a constant, under an activation if there is one.

    Attributes:
        parts: matrices (width of the leaf, *own) by the names of leaves. `own` are the last axes of the value, of
            which every row of the leaves makes its own.
        constant: (*own).
        activation: applied to the sum.
    """

    parts: dict[str, np.ndarray]
    constant: np.ndarray
    activation: str = ""

    @property
    def own(self) -> tuple[int, ...]:
        """The last axes of the value."""
        return self.constant.shape

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Affine:
        """With all arrays changed alike along their last axes."""
        return Affine({n: change(m) for n, m in self.parts.items()}, change(self.constant), self.activation)

    def plus(self, other: Affine) -> Affine:
        """The sum. Raises `NotAffineError` where both are of unlike sizes, or under an activation."""
        if self.own != other.own or self.activation or other.activation:
            raise NotAffineError("adds what is not of one size, or comes from an activation")
        parts = dict(self.parts)
        for name, matrix in other.parts.items():
            parts[name] = parts[name] + matrix if name in parts else matrix
        return Affine(parts, self.constant + other.constant)


@dataclass(frozen=True, eq=False)
class Affines:
    """What values of a graph are, seen from the matrices that make them."""

    values: Values
    _known: dict[str, Affine | str] = field(default_factory=dict)

    def __call__(self, name: str, depth: int = 0) -> Affine:
        """A value. Raises `NotAffineError`."""
        if name not in self._known:
            self._known[name] = f"runs in a circle at {name}"
            try:
                if depth > _DEEPEST:
                    raise NotAffineError(f"is computed by more than {_DEEPEST} operators in a row")
                self._known[name] = self._of(name, depth)
            except NotAffineError as error:
                self._known[name] = str(error)
        found = self._known[name]
        if isinstance(found, str):
            raise NotAffineError(found)
        return found

    def activation(self, name: str) -> str:
        """The activation that a value, or what it is cut out of, has come from last; empty where from none."""
        node = self.values.makers.get(name)
        while node is not None and node.op_type not in ACTIVATIONS:
            if node.op_type not in _MOVES and node.op_type != "Concat":
                return ""
            node = self.values.makers.get(node.input[0])
        return "" if node is None else node.op_type

    def _of(self, name: str, depth: int) -> Affine:
        node = self.values.makers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            raise NotAffineError(f"adds {name}, which no matrix multiplies")
        op = node.op_type
        if op in ACTIVATIONS:
            inner = self(node.input[0], depth + 1)
            if inner.activation:
                raise NotAffineError("has two activations in a row")
            return Affine(inner.parts, inner.constant, op)
        if op in _MOVES:
            return _MOVES[op](self, node, name, self(node.input[0], depth + 1))
        if op == "Concat":
            return self._beside(node, depth)
        if op == "MatMul":
            return self._product(node.input[0], self._matrix(node, 1))
        if op == "Gemm":
            return self._gemm(node, depth)
        if op in ("Add", "Sub"):
            return self._sum(node, -1 if op == "Sub" else 1, depth)
        if op in ("Mul", "Div"):
            return self._scaled(node, depth)
        if op == "Neg":
            return _linear(self(node.input[0], depth + 1)).each(np.negative)
        raise NotAffineError(f"adds {name}, which comes from {op} and which no matrix multiplies")

    def _matrix(self, node: onnx.NodeProto, place: int) -> np.ndarray:
        found = self.values.constants(node.input[place])
        if found is None:
            raise NotAffineError(f"multiplies by {node.input[place]}, which is no constant matrix on the right")
        if found.ndim < 2 or prod(found.shape[:-2]) != 1 or found.dtype != np.float32:
            raise NotAffineError(f"multiplies by {node.input[place]} of shape {found.shape} in {found.dtype}")
        return found.reshape(found.shape[-2:])

    def _product(self, left: str, matrix: np.ndarray) -> Affine:
        parts: dict[str, np.ndarray] = {}
        constant, start = np.zeros(matrix.shape[1], np.float32), 0
        for leaf, width in self._leaves(left, len(matrix)):
            own, start = matrix[start : start + width], start + width
            value = self.values.constants(leaf)
            if value is not None:
                constant = constant + spread(value, (width,)) @ own
            else:
                parts[leaf] = parts[leaf] + own if leaf in parts else own
        return Affine(parts, constant)

    def _leaves(self, name: str, width: int, depth: int = 0) -> list[tuple[str, int]]:
        """What stands beside each other in a value (..., width), and how wide each is."""
        base = self.values.base(name)
        node = self.values.makers.get(base)
        if node is None or node.op_type != "Concat" or depth > _DEEPEST:
            return [(base, width)]
        axis = self.values.attribute(node, "axis", 0)
        shape = self.values.shapes.get(base)
        if axis != -1 and (shape is None or axis != len(shape) - 1):
            return [(base, width)]
        widths = [self.values.width(i) for i in node.input]
        known = sum(n for n in widths if n is not None)
        if widths.count(None) > 1 or known > width:
            return [(base, width)]
        parted = zip(node.input, widths, strict=True)
        return [leaf for i, n in parted for leaf in self._leaves(i, width - known if n is None else n, depth + 1)]

    def _gemm(self, node: onnx.NodeProto, depth: int) -> Affine:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        matrix, left = self._matrix(node, 1), node.input[0]
        if given.get("transA", 0):
            turned = self.values.makers.get(left)
            if turned is None or turned.op_type != "Transpose":
                raise NotAffineError("multiplies what is transposed")
            left = turned.input[0]
        matrix = matrix.T if given.get("transB", 0) else matrix
        alpha, beta = (np.float32(given.get(name, 1.0)) for name in ("alpha", "beta"))
        found = self._product(left, matrix if alpha == 1 else alpha * matrix)
        if len(node.input) < 3 or not node.input[2]:
            return found
        more = self.values.constants(node.input[2])
        if more is not None:
            return Affine(found.parts, found.constant + beta * spread(more, found.own))
        other = self._alike(node.output[0], node.input[2], depth)
        return found.plus(other.each(lambda m: beta * m))

    def _alike(self, name: str, given: str, depth: int) -> Affine:
        """A value that is added to another without being spread over its rows."""
        out, shape = self.values.shapes.get(name), self.values.shapes.get(given)
        if out is not None and shape is not None:
            own, wanted = ([n for n in one[:-1] if n != 1] for one in (shape, out))
            if len(own) != len(wanted) or any(
                isinstance(n, int) and isinstance(m, int) and n != m for n, m in zip(own, wanted, strict=True)
            ):
                raise NotAffineError(f"spreads {given} {shape} over {out}")
        return _linear(self(given, depth + 1))

    def _sum(self, node: onnx.NodeProto, sign: int, depth: int) -> Affine:
        constants = [self.values.constants(name) for name in node.input]
        found: Affine | None = None
        for name, value, own_sign in zip(node.input, constants, (1, sign), strict=True):
            if value is None:
                term = self._alike(node.output[0], name, depth)
                term = term if own_sign == 1 else term.each(np.negative)
                found = term if found is None else found.plus(term)
        if found is None:
            raise NotAffineError(f"adds the constant {node.output[0]} alone")
        for value, own_sign in zip(constants, (1, sign), strict=True):
            if value is not None:
                found = Affine(found.parts, found.constant + np.float32(own_sign) * spread(value, found.own))
        return found

    def _scaled(self, node: onnx.NodeProto, depth: int) -> Affine:
        left, right = (self.values.constants(name) for name in node.input)
        if right is not None:
            found = _linear(self(node.input[0], depth + 1))
            factor = spread(right, found.own)
            return found.each(lambda m: m / factor if node.op_type == "Div" else m * factor)
        if left is None or node.op_type == "Div":
            raise NotAffineError(f"adds {node.output[0]}, a product of two values")
        found = _linear(self(node.input[1], depth + 1))
        factor = spread(left, found.own)
        return found.each(lambda m: m * factor)

    def _beside(self, node: onnx.NodeProto, depth: int) -> Affine:
        every = [self(name, depth + 1) for name in node.input]
        axis = self._own_axis(node, node.input[0], every[0])
        if len({(one.activation, len(one.own)) for one in every}) > 1:
            raise NotAffineError("puts unlike things beside each other")
        if len({tuple(one.parts) for one in every}) > 1:
            # What reads other leaves reads these with zeros.
            leaves = {name: len(m) for one in every for name, m in one.parts.items()}
            every = [
                Affine(
                    {n: one.parts.get(n, np.zeros((w, *one.own), np.float32)) for n, w in leaves.items()},
                    one.constant,
                    one.activation,
                )
                for one in every
            ]
        parts = {name: np.concatenate([one.parts[name] for one in every], axis) for name in every[0].parts}
        return Affine(parts, np.concatenate([one.constant for one in every], axis), every[0].activation)

    def _own_axis(self, node: onnx.NodeProto, given: str, found: Affine, default: int | None = None) -> int:
        """Along which of its own axes a value is cut or put together, counted from the end."""
        axis = self.values.attribute(node, "axis", 0, default)
        return self._counted(given, axis if isinstance(axis, int) else 0, found)

    def _counted(self, given: str, axis: int, found: Affine) -> int:
        if axis >= 0 and given not in self.values.shapes:
            raise NotAffineError(f"cuts {given}, whose axes are not known")
        counted = self.values.axis(given, axis)
        if counted < -len(found.own):
            raise NotAffineError(f"cuts {given} along an axis that no matrix makes")
        return counted

    def _same(self, node: onnx.NodeProto, name: str, found: Affine) -> Affine:
        if self.values.base(name) != self.values.base(node.input[0]) or len(found.own) > 1:
            raise NotAffineError(f"reads {name}, which {node.op_type} has put in another order or precision")
        return found

    def _reshaped(self, node: onnx.NodeProto, name: str, found: Affine) -> Affine:
        shape = self.values.shapes.get(name, ())
        size = prod(found.own)
        for count in range(1, len(shape) + 1):
            last = [n for n in shape[-count:] if isinstance(n, int)]
            if len(last) < count or prod(last) > size:
                break
            if prod(last) == size:
                # Axes of size one before these are left to the rows.
                return found.each(partial(_with_last, count=len(found.own), last=last))
        raise NotAffineError(f"reads {name} in a shape that is not known to keep its rows")

    def _split(self, node: onnx.NodeProto, name: str, found: Affine) -> Affine:
        if len(node.output) == 1:
            return found
        axis = self._own_axis(node, node.input[0], found, 0)
        total, count = found.own[axis], len(node.output)
        sizes = self.values.attribute(node, "split", 1)
        own = sizes if isinstance(sizes, list) else [-(-total // count)] * (count - 1)
        place = list(node.output).index(name)
        return found.each(lambda m: np.split(m, np.cumsum(own)[: count - 1], axis)[place])

    def _sliced(self, node: onnx.NodeProto, name: str, found: Affine) -> Affine:
        starts, ends = (self.values.attribute(node, what, k) for what, k in (("starts", 1), ("ends", 2)))
        if not isinstance(starts, list) or not isinstance(ends, list):
            raise NotAffineError(f"cuts {node.input[0]} at places that are computed")
        axes = self.values.attribute(node, "axes", 3, list(range(len(starts))))
        steps = self.values.attribute(node, "steps", 4, [1] * len(starts))
        if not isinstance(axes, list) or not isinstance(steps, list):
            raise NotAffineError(f"cuts {node.input[0]} at places that are computed")
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            counted = self.values.axis(node.input[0], axis) if node.input[0] in self.values.shapes else axis
            if counted < -len(found.own) and self.values.touches_nothing(node, counted):
                continue
            own_axis = self._counted(node.input[0], axis, found)
            # The end of a slice backwards may lie before the first.
            stop = None if step < 0 and end < -found.own[own_axis] else end
            behind = [slice(None)] * (-own_axis - 1)
            found = found.each(itemgetter((..., slice(start, stop, step), *behind)))
        return found

    def _gathered(self, node: onnx.NodeProto, name: str, found: Affine) -> Affine:
        given = self.values.attribute(node, "axis", 0, 0)
        counted = self.values.axis(node.input[0], given if isinstance(given, int) else 0)
        if counted < -len(found.own) and self.values.touches_nothing(node, counted):
            return found
        axis = self._own_axis(node, node.input[0], found, 0)
        index = self.values.constants(node.input[1])
        if index is None or index.ndim > 1 or (index.ndim == 0 and len(found.own) == 1):
            raise NotAffineError(f"picks of {node.input[0]} what is computed, or one number")
        return found.each(lambda m: np.take(m, index, axis))


def _linear(found: Affine) -> Affine:
    if found.activation:
        raise NotAffineError(f"adds what comes from {found.activation}, and which no matrix multiplies")
    return found


def _with_last(matrix: np.ndarray, count: int, last: Sequence[int]) -> np.ndarray:
    """With other axes in the place of so many last ones."""
    return matrix.reshape(*matrix.shape[: matrix.ndim - count], *last)


def spread(value: np.ndarray, own: tuple[int, ...]) -> np.ndarray:
    """A constant for every row, over its own axes."""
    count = min(value.ndim, len(own))
    try:
        if prod(value.shape[: value.ndim - count]) == 1:
            return np.broadcast_to(value.reshape(value.shape[value.ndim - count :]), own).astype(np.float32)
    except ValueError:
        pass
    raise NotAffineError(f"adds or multiplies a constant of shape {value.shape}, where {own} is expected")


_MOVES: dict[str, Callable[[Affines, onnx.NodeProto, str, Affine], Affine]] = {
    "Identity": Affines._same,
    "Dropout": Affines._same,
    "Cast": Affines._same,
    "Transpose": Affines._same,
    "Reshape": Affines._reshaped,
    "Flatten": Affines._reshaped,
    "Squeeze": Affines._reshaped,
    "Unsqueeze": Affines._reshaped,
    "Split": Affines._split,
    "Slice": Affines._sliced,
    "Gather": Affines._gathered,
}
"""Operators that put numbers elsewhere and leave them as they are."""

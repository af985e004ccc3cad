"""Whole numbers in a graph that follow from the sizes of its values: where `chunk` cuts, written out by an exporter."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import numpy as np
import onnx

_DEEPEST = 16
"""Nodes in a row; cuts are computed by five or six."""

_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    # Of what is not negative, as sizes are.
    "Div": operator.floordiv,
}


class Sizes:
    """What is known of small vectors of whole numbers.

    Args:
        makers: of each value, the node that puts it out.
        constants: the numbers of a value that depends on nothing.
        shapes: of values: sizes of axes, numbers as far as they are known.
    """

    def __init__(
        self,
        makers: Mapping[str, onnx.NodeProto],
        constants: Callable[[str], np.ndarray | None],
        shapes: Mapping[str, tuple[int | str | None, ...]],
    ) -> None:
        self._makers, self._constants, self._shapes = makers, constants, shapes

    def __call__(self, name: str) -> np.ndarray | None:
        """The numbers of a value, all of them known; None where they are not."""
        found = self._found(name, 0)
        if found is None or any(number is None for number in found.reshape(-1)):
            return None
        return found.astype(np.int64)

    def _found(self, name: str, depth: int) -> np.ndarray | None:
        """The same as objects, in which None stands for what is not known."""
        constant = self._constants(name)
        if constant is not None:
            return constant.astype(object) if constant.dtype.kind in "iu" and constant.ndim <= 1 else None
        node = self._makers.get(name)
        if node is None or node.domain not in ("", "ai.onnx") or depth > _DEEPEST:
            return None
        if node.op_type == "Shape":
            return self._shape(node)
        given = [self._found(one, depth + 1) for one in node.input if one]
        if not given or any(one is None for one in given):
            return None
        return self._computed(node, [one for one in given if one is not None])

    def _shape(self, node: onnx.NodeProto) -> np.ndarray | None:
        if node.attribute or node.input[0] not in self._shapes:
            return None
        sizes = self._shapes[node.input[0]]
        return np.array([size if isinstance(size, int) else None for size in sizes], dtype=object)

    def _computed(self, node: onnx.NodeProto, given: list[np.ndarray]) -> np.ndarray | None:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if node.op_type in _ARITHMETIC and len(given) == 2:
            return _each(_ARITHMETIC[node.op_type], *given)
        if node.op_type == "Gather" and axis == 0 and given[0].ndim == 1:
            return np.array(given[0][given[1].astype(np.int64)], dtype=object)
        if node.op_type == "Concat" and all(one.ndim == 1 for one in given):
            return np.concatenate(given)
        if node.op_type == "Unsqueeze" and given[0].ndim == 0:
            return given[0].reshape(1)
        if node.op_type == "Squeeze" and given[0].size == 1:
            return given[0].reshape(())
        if node.op_type in ("Identity", "Cast") and _stays_whole(node):
            return given[0]
        return None


def _each(work: Callable[[int, int], int], left: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """A computation number by number; None where a number is not known, or is divided by nothing."""

    def known(a: int | None, b: int | None) -> int | None:
        if a is None or b is None:
            return None
        return None if work is operator.floordiv and (a < 0 or b <= 0) else work(a, b)

    try:
        return np.array(np.frompyfunc(known, 2, 1)(left, right), dtype=object)
    except ValueError:  # of shapes that do not go together
        return None


def _stays_whole(node: onnx.NodeProto) -> bool:
    to = next((a.i for a in node.attribute if a.name == "to"), onnx.TensorProto.INT64)
    return to in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)

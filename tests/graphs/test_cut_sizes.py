"""Whole numbers that follow from sizes, and those that do not."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from htcompress.graphs.sizes import Sizes

SHAPES = {"x": ("batch", None, 12), "y": (4, 6)}
GIVEN = {
    "last": np.array(-1),
    "first": np.array([0]),
    "two": np.array([2]),
    "none": np.array([0]),
    "half": np.array(0.5),
}


def sizes() -> Sizes:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "last"], ["width"], axis=0),
        helper.make_node("Gather", ["shape", "first"], ["batch"], axis=0),
        helper.make_node("Unsqueeze", ["width", "first"], ["one"]),
        helper.make_node("Add", ["one", "two"], ["more"]),
        helper.make_node("Div", ["more", "two"], ["cut"]),
        helper.make_node("Sub", ["two", "more"], ["below"]),
        helper.make_node("Div", ["below", "two"], ["rounded"]),
        helper.make_node("Div", ["more", "none"], ["endless"]),
        helper.make_node("Mul", ["batch", "two"], ["open"]),
        helper.make_node("Concat", ["cut", "two"], ["both"], axis=0),
        helper.make_node("Concat", ["cut", "batch"], ["partly"], axis=0),
        helper.make_node("Gather", ["partly", "first"], ["taken"], axis=0),
        helper.make_node("Squeeze", ["cut"], ["bare"]),
        helper.make_node("Cast", ["cut"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["y"], ["end"], start=1),
        helper.make_node("Add", ["shape", "both"], ["unlike"]),
        helper.make_node("Neg", ["two"], ["other"]),
    ]
    return Sizes({node.output[0]: node for node in nodes}, GIVEN.get, SHAPES)


@pytest.mark.parametrize(
    ("name", "wanted"), [("width", 12), ("more", [14]), ("cut", [7]), ("both", [7, 2]), ("taken", [7]), ("bare", 7)]
)
def test_what_follows(name: str, wanted: object) -> None:
    found = sizes()(name)
    assert found is not None
    assert found.tolist() == wanted


@pytest.mark.parametrize(
    "name", ["shape", "batch", "open", "partly", "rounded", "endless", "real", "end", "unlike", "other", "half", "x"]
)
def test_what_does_not(name: str) -> None:
    assert sizes()(name) is None

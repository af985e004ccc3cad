"""Recurrent nodes in branches of If: found, seen, proven and replaced where they stand; onnxruntime is the judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from crossing import crossed
from onnx import TensorProto, helper, numpy_helper
from onnx_models import node_model, numbers
from small import Outcome

import htcompress
from htcompress.graphs.branches import every_graph, seen_from_outside
from htcompress.graphs.nodes import find
from htcompress.graphs.passing import entering_of, outputs_of, ran
from htcompress.graphs.replaced import replaced
from htcompress.graphs.twins import Twins
from htcompress.report import read_report

Command = Callable[..., Outcome]

INPUTS, HIDDEN = 20, 12
X = ["time", "batch", INPUTS]


def lstm(name: str, values: str, *, seed: int | None = None, initial: bool = False) -> list[onnx.NodeProto]:
    """An LSTM over x that gives `values`; its weights are Constants beside it, or those around it (no seed)."""
    rng, made = np.random.default_rng(seed), []
    weights = ["W", "R", "B"] if seed is None else [f"{name}.{key}" for key in "WRB"]
    if seed is not None:
        shapes = (1, 4 * HIDDEN, INPUTS), (1, 4 * HIDDEN, HIDDEN), (1, 8 * HIDDEN)
        for key, shape in zip(weights, shapes, strict=True):
            value = numpy_helper.from_array(numbers(rng, *shape))
            made.append(helper.make_node("Constant", [], [key], value=value))
    states = ["", "h", "c"] if initial else []
    made.append(helper.make_node("LSTM", ["x", *weights, *states], [values], name=name, hidden_size=HIDDEN))
    return made


def branch(nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
    return helper.make_graph(nodes, output, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


def either(condition: str, then: onnx.GraphProto, other: onnx.GraphProto, output: str) -> onnx.NodeProto:
    return helper.make_node("If", [condition], [output], then_branch=then, else_branch=other, name=f"if {output}")


def branched(*, shared: bool = False, nested: bool = False, by_data: bool = False, opset: int = 17) -> onnx.ModelProto:
    """x (time, batch, 20) to y (time, batch, 5): an LSTM of 12 in each branch of an If, and a product.

    Args:
        shared: whether both have the same weights, which stand around them.
        nested: whether the If stands in a branch of another, whose other branch gives what it gets.
        by_data: whether the data say which branch is run, and not an input.
    """
    rng = np.random.default_rng(0)
    seeds = (None, None) if shared else (1, 2)
    # Values beside each other bear the same name.
    inner = either("yes", branch(lstm("b", "v", seed=seeds[1]), "v"), branch(lstm("a", "v", seed=seeds[0]), "v"), "w")
    if nested:
        nothing = branch([helper.make_node("Identity", ["zeros"], ["u"])], "u")
        same = helper.make_node("Identity", ["w"], ["u"])
        inner = either("outer", branch([inner, same], "u"), nothing, "w2")
    nodes = [inner, helper.make_node("MatMul", [inner.output[0], "last"], ["y"])]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, X)]
    given += [helper.make_tensor_value_info("outer", TensorProto.BOOL, [])] if nested else []
    stored = {"last": numbers(rng, HIDDEN, 5), "zeros": np.zeros((1, 1, 1, HIDDEN), np.float32)}
    if shared:
        stored |= {"W": numbers(rng, 1, 48, INPUTS), "R": numbers(rng, 1, 48, HIDDEN), "B": numbers(rng, 1, 96)}
    if by_data:
        stored["zero"] = np.zeros((), np.float32)
        least = helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)
        nodes = [least, helper.make_node("Greater", ["mean", "zero"], ["yes"]), *nodes]
    else:
        given.append(helper.make_tensor_value_info("yes", TensorProto.BOOL, []))
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["time", 1, "batch", 5])]
    body = helper.make_graph(
        nodes, "branched", given, result, [numpy_helper.from_array(value, name) for name, value in stored.items()]
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    own = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {n: v for n, v in given.items() if n in own}), strict=True))


def feed(yes: bool, seed: int = 3) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((7, 3, INPUTS)).astype(np.float32)
    return {"x": x, "yes": np.array(yes), "outer": np.array(True)}


CASES = crossed([(s, n, o) for s in (False, True) for n in (False, True) for o in (11, 13, 18)])


@pytest.mark.parametrize(("shared", "nested", "opset"), CASES)
@pytest.mark.parametrize("yes", [True, False])
def test_what_passes_through_is_seen(shared: bool, nested: bool, opset: int, yes: bool) -> None:
    model, given = branched(shared=shared, nested=nested, opset=opset), feed(yes)
    nodes, left = find(model)
    assert not left
    assert [node.name for node in nodes] == (["a"] if shared else ["a", "b"])
    every = [one for node in nodes for one in node.everywhere]
    assert [one.name for one in every] == ["a", "b"]
    seen = seen_from_outside(model, every)
    seen.graph.output.extend(onnx.ValueInfoProto(name=one.seen(v)) for one in every for v in one.inner_values)
    values = run(seen, given)
    assert np.array_equal(values["y"], run(model, given)["y"])
    (node,) = [node for node in nodes if ran(node, values)]
    assert node.name == ("b" if yes and not shared else "a")
    with torch.no_grad():
        found = Twins(nodes).outputs(node.name, entering_of(node, values))
    (wanted,) = outputs_of(node, values)
    assert torch.allclose(found[0], wanted, atol=2e-6)
    last = numpy_helper.to_array(model.graph.initializer[0])
    assert np.allclose(wanted.numpy() @ last, values["y"], atol=1e-5)


@pytest.mark.parametrize(("shared", "nested", "opset"), CASES)
def test_a_layer_stands_where_its_nodes_stood(shared: bool, nested: bool, opset: int) -> None:
    model = branched(shared=shared, nested=nested, opset=opset)
    nodes, _ = find(model)
    twins = Twins(nodes[:1])
    made = htcompress.compress(twins, ratio=3, bits=8, layout="split")
    assert made.model is not None
    result = replaced(model, nodes[:1], made.modules)
    onnx.checker.check_model(result)
    last = torch.from_numpy(numpy_helper.to_array(model.graph.initializer[0]).copy())
    for yes in (True, False):
        given = feed(yes)
        found = run(result, given)["y"]
        if yes and not shared:
            assert np.array_equal(found, run(model, given)["y"])
            continue
        with torch.no_grad():
            layer, _ = made.modules["a"](torch.from_numpy(given["x"]))
        assert np.allclose(found[:, 0], (layer @ last).numpy(), atol=1e-5)
    # The dense weights are gone, what stands instead is there once, and names are unlike those around them.
    sizes = [np.prod(i.dims) for _, graph in every_graph(result.graph) for i in graph.initializer]
    dense = sum(w.numel() for w in nodes[0].weights.values())
    assert sum(sizes) < dense / 2 + 60 + HIDDEN
    names = [i.name for _, graph in every_graph(result.graph) for i in graph.initializer]
    assert len(names) == len(set(names))
    if shared:
        assert not {"W", "R", "B"} & set(names)
    else:
        graphs = dict(every_graph(result.graph))
        kept = [n.output[0] for graph in graphs.values() for n in graph.node if n.op_type == "Constant"]
        assert {"b.W", "b.R", "b.B"} <= set(kept)
        assert not {"a.W", "a.R", "a.B"} & set(kept)


def test_weights_alike_in_one_branch_are_two_nodes_of_one_layer() -> None:
    """Only what never runs in one call is one node."""
    both = [*lstm("a", "v"), *lstm("b", "v2"), helper.make_node("Add", ["v", "v2"], ["sum"])]
    model = branched(shared=True)
    model.graph.node[0].CopyFrom(either("yes", branch(lstm("c", "v3"), "v3"), branch(both, "sum"), "w"))
    nodes, _ = find(model)
    assert [[one.name for one in node.everywhere] for node in nodes] == [["a", "c"], ["b"]]
    assert [node.layer for node in nodes] == ["a", "a"]
    twins = Twins(nodes)
    made = htcompress.compress(twins, ratio=3, bits=8)
    result = replaced(model, nodes, made.modules)
    onnx.checker.check_model(result)
    for yes in (True, False):
        run(result, feed(yes))


def test_loops_are_left() -> None:
    inner = node_model("LSTM")
    body = helper.make_graph(list(inner.graph.node), "body", [], list(inner.graph.output), inner.graph.initializer)
    loop = helper.make_node("Loop", ["count", ""], ["Y", "Y_h", "Y_c"], body=body)
    then = helper.make_graph([loop], "then", [], list(inner.graph.output))
    node = helper.make_node("If", ["yes"], ["Y2", "Y_h2", "Y_c2"], then_branch=then, else_branch=then, name="either")
    outer = helper.make_graph([node], "outer", list(inner.graph.input), [])
    nodes, left = find(helper.make_model(outer, opset_imports=[helper.make_opsetid("", 17)]))
    assert not nodes
    assert left == dict.fromkeys(("layer", "layer_2"), "stands in a subgraph of Loop, where it is left alone")


def test_before_they_could_be_looked_into_branches_are_left() -> None:
    nodes, left = find(branched(opset=10))
    assert not nodes
    assert left["a"].startswith(
        "stands in a branch of an If of opset 10, where it is left alone; bring the model to 11"
    )


def converted(htc: Command, model: onnx.ModelProto, **more: Any) -> Outcome:
    """Of 48 samples, one a call, whose means lie on both sides of zero."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((48, 9, 1, 4)).cumsum(1) @ rng.standard_normal((4, INPUTS)) / 3
    onnx.save(model, "model.onnx")
    np.savez("x.npz", x=x.astype(np.float32), **more)
    options = ("--ratio", "3", "--calibration", "x.npz", "--steps", "20", "-o", "out")
    return htc("convert", "model.onnx", *options)


def test_convert(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = converted(htc, branched(), yes=np.array(True))
    assert ended.code == 0, ended.err
    report = read_report(tmp_path / "out")
    assert [layer.name for layer in report.layers] == ["b"]
    assert report.left["a"] == "stands in a branch that none of the 36 calls of the calibration data runs"
    # What is left counts, too.
    totals = report.totals
    assert totals.model_parameters_before - totals.parameters_before == totals.parameters_before + 60 + HIDDEN
    after = onnx.load("out/model.onnx")
    x = np.load("x.npz")["x"][-12:]
    wanted, found = (
        np.stack([run(m, {"x": own, "yes": np.array(True)})["y"] for own in x])
        for m in (onnx.load("model.onnx"), after)
    )
    error = np.sqrt(np.square(found - wanted).sum() / np.square(wanted - wanted.mean()).sum())
    assert report.quality.finetuned == pytest.approx(error, rel=1e-3)
    assert 0 < error < 1
    given = feed(False)
    assert np.array_equal(run(after, given)["y"], run(onnx.load("model.onnx"), given)["y"])


def test_the_data_say_which_branch_is_run(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = converted(htc, branched(shared=True, by_data=True))
    assert ended.code == 0, ended.err
    assert "a has the weights of b in other branches: one layer stands for all" in ended.err
    report = read_report(tmp_path / "out")
    assert [layer.name for layer in report.layers] == ["a"]
    assert not report.left
    assert report.quality.finetuned is not None
    assert 0 < report.quality.finetuned < 1
    ended = converted(htc, branched(by_data=True))
    assert ended.code == 2
    assert "of the 36 calls of the calibration data run" in ended.err


def test_without_data(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(branched(nested=True), "model.onnx")
    ended = htc("convert", "model.onnx", "--ratio", "1.5", "--layout", "svd", "-o", "out")
    assert ended.code == 0, ended.err
    assert [layer.name for layer in read_report(tmp_path / "out").layers] == ["a", "b"]
    after = onnx.load("out/model.onnx")
    for yes in (True, False):
        wanted, found = (run(m, feed(yes))["y"] for m in (onnx.load("model.onnx"), after))
        assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.5

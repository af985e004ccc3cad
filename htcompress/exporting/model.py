"""A whole model as ONNX: torch's exporter for what is around the recurrent layers, our nodes for the layers.

The exporter sees each compressed layer as one unknown operator, whose place its nodes then take.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from htcompress.data import Peeked, calibration_reading
from htcompress.errors import RequestError, TaskError
from htcompress.exporting.graph import Graph
from htcompress.exporting.recurrent import add_recurrent, check_expressible
from htcompress.exporting.sizes import verified
from htcompress.exporting.streaming import Stateful, named
from htcompress.model.replace import copied, stand_ins
from htcompress.nn.recurrence import State
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.settings import RecurrentSettings
from htcompress.observer import Observer
from htcompress.task import Task, output_of
from htcompress.values import Arguments, mapped

DOMAIN = "htcompress"
ALONE = "Export the recurrent layers alone, without --task."


def whole_model(
    model: nn.Module, task: Task, observer: Observer, *, states: bool = False
) -> tuple[bytes, float, tuple[str, ...]]:
    """The model around its compressed layers as ONNX, the largest difference from torch, and sizes that are fixed.

    Args:
        model: with compressed layers.
        task: its calibration data give the inputs; sizes that the model leaves open are dynamic.
        observer: is told the stages.
        states: whether the states of its layers are inputs and outputs.

    Raises `RequestError` where the model cannot be expressed, `TaskError` where its inputs are no tensors.
    """
    model = copied(model).float().eval()
    modules = stand_ins(model)
    for name, module in modules.items():
        check_expressible(module.settings, name)
    given = _arguments(model, task)
    _check_inputs(model, modules, given, task)
    given = _larger(model, given)
    if states:
        model = Stateful(model, modules, given)
        modules, given = stand_ins(model), (*given, *model.states())
    observer.stage("exporting the model")
    made = _spliced(_traced(model, modules, given), modules)
    made = named(made, model) if isinstance(model, Stateful) else made
    observer.stage("comparing with onnxruntime")
    return verified(model, made, given)


def _arguments(model: nn.Module, task: Task) -> tuple[Any, ...]:
    first = Peeked(task.calibration)
    if first.empty:
        raise TaskError(f"calibration() of {task.source} yields nothing; export needs an input of the model.")
    leaves = pytree.tree_leaves(first.first)
    strange = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
    if strange:
        raise RequestError(
            f"calibration() of {task.source} yields a {strange[0]}, which is no input of an ONNX model; tensors are. "
            f"{ALONE}"
        )
    # The model is exported in float32, whatever it was trained in.
    item = mapped(first.first, lambda leaf: leaf.float() if leaf.is_floating_point() else leaf)
    reading, _ = calibration_reading(model, item)
    return _in_order(model, reading(item), task)


def _in_order(model: nn.Module, given: Arguments, task: Task) -> tuple[Any, ...]:
    """Arguments as `forward` takes them one after the other: the inputs of an ONNX model have an order."""
    if not given.named:
        return tuple(given)
    bound = signature(model.forward).bind(*given, **given.named)
    if bound.kwargs:
        raise RequestError(
            f"calibration() of {task.source} gives forward() {' and '.join(bound.kwargs)} by name alone: an argument "
            f"before has been left out, or it takes no other. Give all of them, or yield tuples. {ALONE}"
        )
    return bound.args


def _check_inputs(model: nn.Module, modules: Mapping[str, HTRecurrent], given: tuple[Any, ...], task: Task) -> None:
    """Run the model once. Raises `RequestError` where a layer reads packed sequences."""

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], PackedSequence):
            name = next(name for name, other in modules.items() if other is module)
            raise RequestError(
                f"Layer {name or '(top level)'} reads packed sequences, which no ONNX model takes. Export the "
                f"recurrent layers alone, without --task and with --lengths."
            )

    hooks = [module.register_forward_pre_hook(look) for module in modules.values()]
    try:
        with torch.no_grad():
            output_of(model, given, source=task.source)
    finally:
        for hook in hooks:
            hook.remove()


def _larger(model: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with a batch or a sequence of one doubled, as far as the model takes that.

    The exporter takes a size of 1 for a fixed one.
    """
    leaves, spec = pytree.tree_flatten(given)
    ones = [(k, axis) for k, leaf in enumerate(leaves) for axis in range(min(2, leaf.ndim)) if leaf.shape[axis] == 1]
    for count in range(min(len(ones), 6), 0, -1):
        for chosen in itertools.combinations(ones[:6], count):
            larger = list(leaves)
            for k, axis in chosen:
                larger[k] = torch.cat([larger[k]] * 2, axis)
            made = pytree.tree_unflatten(larger, spec)
            try:
                with torch.no_grad():
                    model(*made)
            except Exception:
                continue
            return tuple(made)
    return given


def _hollow(model: nn.Module, modules: Mapping[str, HTRecurrent]) -> nn.Module:
    """A copy of the model whose recurrent layers call an operator that only this module knows.

    What a class of the user's or a hook adds to a layer stays.
    """

    def run_layers(place: str, s: RecurrentSettings, x: Tensor, batch_sizes: Tensor | None, state: State) -> Any:
        if batch_sizes is not None:
            raise RequestError(f"Layer {place!r} reads packed sequences, which ONNX does not have. {ALONE}")
        out, *last = _placed(place, x, state, (x.shape[0], x.shape[1], s.num_directions * s.state_size))
        return out, tuple(last)

    def run_cell(place: str, s: RecurrentSettings, x: Tensor, state: State) -> Any:
        _, *last = _placed(place, x, state, tuple(state[0].shape))
        return tuple(last)

    hollow = copied(model).eval()
    for name, module in modules.items():
        run = run_cell if module.settings.cell else run_layers
        vars(hollow.get_submodule(name))["_run"] = partial(run, name, module.settings)
    return hollow


def _placed(name: str, x: Tensor, state: State, shape: tuple[int, ...]) -> Sequence[Tensor]:
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Recurrent",
        (x, *state),
        {"layer": name},
        dtypes=(x.dtype,) * (1 + len(state)),
        shapes=(shape, *(t.shape for t in state)),
        version=1,
    )


def _traced(model: nn.Module, modules: Mapping[str, HTRecurrent], given: tuple[Any, ...]) -> onnx.ModelProto:
    """The model with an unknown operator in each layer's place. Raises `RequestError` where torch cannot trace it."""
    hollow = _hollow(model, modules)
    shapes: Any = pytree.tree_map(lambda t: [torch.export.Dim.AUTO] * t.ndim, given)
    # All that `forward(*given)` takes is one argument to the exporter.
    shapes = (shapes,) if isinstance(model, Stateful) else shapes
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(hollow, given, dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(exported, dynamo=True, verbose=False)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise RequestError(f"torch cannot export the model around the layers: {said.strip()}. {ALONE}") from error
    if program is None:
        raise RequestError(f"torch gave no program for the model around the layers. {ALONE}")
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own registry."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)


def _spliced(model: onnx.ModelProto, modules: Mapping[str, HTRecurrent]) -> onnx.ModelProto:
    """The layers' nodes in place of the unknown operators."""
    graphs = {name: Graph(f"{name}/" if name else "recurrent/") for name in modules}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        name = next(a.s for a in node.attribute if a.name == "layer").decode()
        graph, module = graphs[name], modules[name]
        start = len(graph.nodes)
        x, *state = node.input
        if module.settings.cell:
            y, after = add_recurrent(graph, module, graph.unsqueeze(x, 0), [graph.unsqueeze(t, 0) for t in state])
            results = [graph.squeeze(value, 0) for value in (y, *after)]
        else:
            y, after = add_recurrent(graph, module, x, state)
            results = [y, *after]
        for value, result in zip(results, node.output, strict=True):
            if result:
                graph.nodes.append(helper.make_node("Identity", [value], [result], name=f"{graph.prefix}{result}"))
        nodes += graph.nodes[start:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(number for graph in graphs.values() for number in graph.initializers)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.producer_name = "htcompress"
    onnx.checker.check_model(model)
    return model

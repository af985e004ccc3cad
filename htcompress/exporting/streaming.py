"""A whole model whose recurrent layers take their states from outside, and give them back: for calls in a row."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from htcompress.errors import RequestError
from htcompress.model.replace import recurrent_modules
from htcompress.nn.recurrent import HTRecurrent

STATES = ("h", "c")


class _Begun:
    """The state that one layer begins with, and the one that it ends with; a hook of that layer, before and after."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: tuple[Tensor, ...] | None = None
        self.last: tuple[Tensor, ...] = ()
        self.calls = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Put the state in; where there is none yet, let the layer begin as it does."""
        if len(args) > 1 or given.get("hx") is not None:
            raise RequestError(f"Layer {self.name or '(top level)'} is given its state by the model itself. {_WITHOUT}")
        self.calls += 1
        if self.state is None:
            return None
        return (args[0] if args else given["input"], self.state if len(self.state) > 1 else self.state[0]), {}

    def after(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Keep the state it ends with."""
        last = result[1]
        self.last = tuple(last) if isinstance(last, tuple) else (last,)


_WITHOUT = "Leave out --states."


class Stateful(nn.Module):
    """A model called with its arguments and then all states, which gives what it gives and then all last states.

    Attributes:
        names: of the states that it takes, `layer.h_0`; those that it gives end in `_n`.
        takes_names: whether each of its other inputs is an argument of the model's forward().
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, HTRecurrent], given: Sequence[Any]) -> None:
        """Around a model, which is run once on its arguments.

        Raises `RequestError` where it has no layer that begins with zeros, once in a call.
        """
        super().__init__()
        self.model = model
        if dense := list(recurrent_modules(model)):
            raise RequestError(
                f"Layer {dense[0] or '(top level)'} was left dense, and its state is its own. {_WITHOUT}"
            )
        layers = {name: module for name, module in modules.items() if not module.settings.cell}
        if len(layers) < len(modules) or not layers:
            raise RequestError(f"The model runs cells, whose states it passes on itself. {_WITHOUT}")
        both = [name or "(top level)" for name, module in layers.items() if module.settings.bidirectional]
        if both:
            raise RequestError(
                f"Layer {both[0]} reads from the end, too, and cannot go on from call to call. {_WITHOUT}"
            )
        self._begun = {name: _Begun(name) for name in layers}
        for name, module in layers.items():
            module.register_forward_pre_hook(self._begun[name].before, with_kwargs=True)
            module.register_forward_hook(self._begun[name].after)
        with torch.no_grad():
            model(*given)
        for name, begun in self._begun.items():
            if begun.calls != 1:
                raise RequestError(f"Layer {name or '(top level)'} runs {begun.calls} times in a call. {_WITHOUT}")
        self.takes_names = all(isinstance(one, Tensor) for one in given)
        self._taken = {name: len(begun.last) for name, begun in self._begun.items()}
        self.names = [f"{name}.{s}_0" if name else f"{s}_0" for name, n in self._taken.items() for s in STATES[:n]]

    def states(self, seed: int = 0) -> list[Tensor]:
        """States of the sizes that were seen, drawn: with zeros nobody would see one that goes nowhere."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(t.shape, generator=generator) - 0.5 for begun in self._begun.values() for t in begun.last]

    def forward(self, *given: Any) -> tuple[Any, ...]:
        """The outputs of the model, flat, and the last states."""
        states = given[len(given) - len(self.names) :]
        at = 0
        for name, count in self._taken.items():
            self._begun[name].state = tuple(states[at : at + count])
            at += count
        result = self.model(*given[: len(given) - len(self.names)])
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        return (*outputs, *(last for begun in self._begun.values() for last in begun.last))


def named(made: onnx.ModelProto, model: Stateful) -> onnx.ModelProto:
    """The graph with its inputs called as the model's forward() calls them, and its states after their layers."""
    own = [name for name, p in inspect.signature(model.model.forward).parameters.items() if p.kind in _POSITIONAL]
    rest = len(made.graph.input) - len(model.names)
    fits = model.takes_names and len(own) >= rest
    inputs = [*(own[:rest] if fits else [f"input_{k}" for k in range(rest)]), *model.names]
    outputs = [value.name for value in made.graph.output]
    outputs[len(outputs) - len(model.names) :] = [f"{name[:-1]}n" for name in model.names]
    inner = {name for node in made.graph.node for name in (*node.input, *node.output)}
    pairs = [
        (value, name if name == value.name or name not in inner else f"{name}_")
        for values, names in ((made.graph.input, inputs), (made.graph.output, outputs))
        for value, name in zip(values, names, strict=True)
    ]
    # Nodes, and graphs in them, keep their names for what they read and put out.
    given = [helper.make_node("Identity", [name], [value.name]) for value, name in pairs[: len(inputs)]]
    put_out = [helper.make_node("Identity", [value.name], [name]) for value, name in pairs[len(inputs) :]]
    nodes = [*given, *made.graph.node, *put_out]
    del made.graph.node[:]
    made.graph.node.extend(node for node in nodes if node.op_type != "Identity" or node.input[0] != node.output[0])
    for value, name in pairs:
        value.name = name
    onnx.checker.check_model(made)
    return made


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

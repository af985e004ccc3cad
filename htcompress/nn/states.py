"""What modules keep beside their parameters: hidden states between two calls, attention weights, running means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from htcompress.nn.gates import GateWeights
from htcompress.nn.recurrent import HTRecurrent
from htcompress.nn.settings import is_recurrent
from htcompress.nn.weights import Weight
from htcompress.values import leaves, mapped, tensors_of

_REGISTERED = frozenset(vars(nn.Module()))
"""The attributes that torch itself keeps in every module."""

_INTERNAL = _REGISTERED | frozenset(vars(nn.LSTM(1, 1))) | {"settings", "gates", "watch"}


def kept_states(model: nn.Module) -> dict[str, list[Tensor]]:
    """The tensors in attributes and buffers of a model's modules, by module and name."""
    found = {}
    for path, module in model.named_modules():
        for name, value in _attributes(module).items():
            if tensors := list(leaves(value)):
                found[f"{path}.{name}"] = tensors
    return found


@contextmanager
def states_kept(model: nn.Module | None) -> Iterator[None]:
    """Afterwards the attributes of a model's modules are what they were; parameters and buffers are not touched."""
    modules = [] if model is None else list(model.modules())
    before = [(module, {k: v for k, v in vars(module).items() if k not in _REGISTERED}) for module in modules]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in vars(module).keys() - attributes.keys() - _REGISTERED:
                del vars(module)[name]
            vars(module).update(attributes)


def cut_off(model: nn.Module) -> None:
    """Let states that a model keeps from one call to the next forget how they came about."""
    for module in model.modules():
        own = {name: value for name, value in vars(module).items() if name not in _REGISTERED}
        for name, value in (own | dict(module.named_buffers(recurse=False))).items():
            if any(t.requires_grad for t in tensors_of(value)):
                _put(module, name, mapped(value, Tensor.detach))


States = dict[tuple[str, str], Any]
"""What attributes and buffers hold, by the names of modules and their own."""


def states_of(model: nn.Module) -> States:
    """What a model's modules keep in attributes and buffers: tensors, and None where they may come to be."""
    return {
        (path, name): mapped(value, lambda tensor: tensor.detach().clone())
        for path, module in model.named_modules()
        for name, value in _attributes(module).items()
        if value is None or any(True for _ in tensors_of(value))
    }


def differing(first: States, second: States) -> set[tuple[str, str]]:
    """Where a model keeps something else than it did."""
    return {key for key, value in second.items() if key not in first or not _same(first[key], value)}


def put_states(model: nn.Module, states: States) -> None:
    """Let a model go on from states, of its own or of another whose modules have these names."""
    modules = dict(model.named_modules())
    for (path, name), value in states.items():
        module = modules.get(path)
        if module is not None and name in _attributes(module):
            _put(module, name, mapped(value, Tensor.clone))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes and buffers of a module that are its own affair."""
    if isinstance(module, GateWeights | Weight):
        return {}  # what these keep is computed of parameters
    skipped = _INTERNAL if isinstance(module, HTRecurrent) or is_recurrent(module) else _REGISTERED
    own = {name: value for name, value in vars(module).items() if name not in skipped}
    return own | dict(module.named_buffers(recurse=False))


def _same(first: Any, second: Any) -> bool:
    before, after = list(tensors_of(first)), list(tensors_of(second))
    return len(before) == len(after) and all(map(torch.equal, before, after))


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute past a module's own ways, or a buffer."""
    if name in vars(module):
        vars(module)[name] = value
    else:
        setattr(module, name, value)

"""What modules keep beside their parameters: hidden states between two calls, attention weights, running means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
        if isinstance(module, GateWeights | Weight):
            continue  # what these keep is computed of parameters
        skipped = _INTERNAL if isinstance(module, HTRecurrent) or is_recurrent(module) else _REGISTERED
        kept = {name: value for name, value in vars(module).items() if name not in skipped}
        kept |= module._buffers
        for name, value in kept.items():
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
        for name, value in list(vars(module).items()):
            if name not in _REGISTERED and any(t.requires_grad for t in tensors_of(value)):
                vars(module)[name] = mapped(value, Tensor.detach)

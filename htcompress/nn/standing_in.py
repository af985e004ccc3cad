"""Turning a recurrent module of a model into a compressed one, in place."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import new_class
from typing import Any

from torch import nn

from htcompress.nn.adapted import ADAPTED
from htcompress.nn.calling import CalledAsLayers, WithStates
from htcompress.nn.recurrence import TORCH_CLASSES
from htcompress.nn.recurrent import FAMILY, HTCell, HTLayers, HTRecurrent
from htcompress.nn.settings import torch_class


@cache
def stand_in_class(like: Any) -> type[HTRecurrent]:
    """The drop-in for modules of a class: torch's, or one derived from it.

    What a derived class adds comes first, and finds the drop-in where it calls torch's class by `super()`.
    """
    base = next(cls for cls in FAMILY if issubclass(cls, torch_class(like)))
    if like in (*TORCH_CLASSES, *ADAPTED):
        return base
    made: type[HTRecurrent] = new_class(f"HT{like.__name__}", (like, base))
    made.__module__ = like.__module__
    made.__reduce_ex__ = lambda self, _: (_hollow, (like,), self.__getstate__())  # type: ignore[method-assign]
    return made


def _hollow(like: Any) -> HTRecurrent:
    cls = stand_in_class(like)
    return cls.__new__(cls)


def become(module: nn.Module, stand_in: HTRecurrent) -> None:
    """Turn a recurrent module, in place, into a stand-in with the weights of another.

    Whoever holds the module holds the stand-in; its hooks, its mode and what a derived class keeps in it stay.

    Raises `TypeError` where the module's class does not allow it.
    """
    if clash := _clashing(module):
        raise TypeError(f"its {clash} has the name of something that a compressed layer uses itself")
    settings = replace(stand_in.settings, **_live(module))
    training = module.training
    for names in settings.weight_names:
        for name in names:
            del module._parameters[name]
    for name in _FLAT:
        vars(module).pop(name, None)
    kind: Any = type(module)
    module.__class__ = stand_in_class(kind)
    module._take(settings, stand_in.gates)  # type: ignore[operator]
    module.train(training)


_FLAT = ("_flat_weights", "_flat_weights_names", "_all_weights", "_flat_weight_refs")
"""Where torch's modules keep their weights once more."""


def _clashing(module: nn.Module) -> str | None:
    """An attribute or a method of a module, of its own or of its class, that would hide one of the drop-in's."""
    if isinstance(module, ADAPTED):
        return None
    torchs = torch_class(type(module))
    ours = {
        name
        for cls in (WithStates, CalledAsLayers, HTRecurrent, HTLayers, HTCell)
        for name in (*vars(cls), *cls.__annotations__)
    }
    ours -= {*dir(torchs), *_FLAT, *vars(nn.Module())}
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    derived = type(module).__mro__[: type(module).__mro__.index(torchs)]
    return next(iter(sorted(ours & own.union(*map(vars, derived)))), None)


def _live(module: nn.Module) -> dict[str, Any]:
    """Settings that may be changed on a module after it was made."""
    return {name: getattr(module, name) for name in ("batch_first", "dropout") if hasattr(module, name)}

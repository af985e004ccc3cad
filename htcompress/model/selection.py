"""Which recurrent layers are looked at: all names of each, and what a checkpoint leaves open about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from htcompress.errors import CheckpointError, RequestError
from htcompress.model.replace import recurrent_modules
from htcompress.nn.settings import RecurrentSettings


def selected(
    names: Mapping[str, Sequence[str]], pattern: str, *, source: str = "The checkpoint", hint: str = ""
) -> list[str]:
    """The layers one of whose names matches a glob.

    Args:
        names: all names of each layer, by its first.
        hint: what else is to be said where there are no layers.

    Raises `RequestError` where none matches, `CheckpointError` where there are no layers.
    """
    if not names:
        raise CheckpointError(
            f"{source} has no recurrent layers: it holds no torch.nn.LSTM, GRU or RNN and none of their cells. "
            f"htcompress compresses those layers.{hint}"
        )
    chosen = [name for name, every in names.items() if any(fnmatchcase(one, pattern) for one in every)]
    if not chosen:
        shown = ", ".join(repr(name) for name in names)
        raise RequestError(f"--layers {pattern!r} matches none of the recurrent layers: {shown}.")
    return chosen


def scripted(model: nn.Module) -> str:
    """What is to be said of a model whose layers are not found because it is compiled; begins with a space."""
    if not isinstance(model, torch.jit.ScriptModule):
        return ""
    return " It is a module of TorchScript: give the class itself, and not what torch.jit.script makes of it."


def module_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of a model's recurrent modules, by their first."""
    every = list(model.named_modules(remove_duplicate=False))
    return {
        name: [other for other, found in every if found is module] for name, module in recurrent_modules(model).items()
    }


def assumed_settings(settings: RecurrentSettings) -> list[str]:
    """What names and shapes of tensors do not tell of a layer."""
    found = [] if settings.cell else ["batch_first"]
    return [*found, "nonlinearity"] if settings.recurrence.nonlinearity is not None else found

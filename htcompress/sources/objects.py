"""What the objects of a pickle become: tensors that are not looked at yet, plain dicts, and inert stand-ins."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StorageType:
    """A class of storages, by the numbers in it."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """A storage as a pickle names it: `key` in its file, `claimed` numbers of `dtype`.

    `view` (first number, how many) is the part of it that is meant; files of torch before 0.4 have such parts.
    """

    key: str
    dtype: torch.dtype
    claimed: int
    view: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Pending:
    """A tensor as a pickle describes it. `kind` is empty for a plain dense one, else it says what it is in words."""

    storage: Storage | None
    offset: Any
    size: Any
    stride: Any
    dtype: torch.dtype | None
    kind: str = ""
    quantizer: tuple[Any, ...] | None = None


class Opaque:
    """A value that is no part of a model (an argparse.Namespace, a NumPy number): there, but not looked into."""


class Inert(Opaque):
    """An object of a class that is not known here: its attributes, nothing that it does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: dict[Any, Any] = {}

    def build(self, state: Any) -> None:
        """Take the attributes that a pickle gives it."""
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.state.update(dict.items(part))


class PlainDict(OrderedDict[Any, Any]):
    """An `OrderedDict` of a pickle. Of the attributes that a pickle gives it only torch's `_metadata` is kept."""

    metadata: Any = None

    def __setstate__(self, state: Any) -> None:
        self.metadata = state.get("_metadata") if isinstance(state, dict) else None


MOST_NAMES = 1_000_000
_DEEPEST = 64


def unfolded(value: Any, depth: int = 0) -> Any:
    """The value with objects that hold tensors (modules) as dicts of these by dotted names, like a state_dict."""
    if isinstance(value, Inert):
        return PlainDict(_tensors(value)) or value
    if type(value) in (dict, PlainDict) and depth < _DEEPEST and any(isinstance(v, Inert) for v in dict.values(value)):
        for key, inner in list(dict.items(value)):
            dict.__setitem__(value, key, unfolded(inner, depth + 1))
    return value


def _tensors(module: Inert) -> dict[str, Pending]:
    """The parameters and persistent buffers of a module; of another object, its tensors and those of its parts."""
    found: dict[str, Pending] = {}
    visits = 0

    def look(prefix: str, one: Inert, above: tuple[int, ...]) -> None:
        nonlocal visits
        visits += 1
        # A module may stand in several places, but not within itself.
        if id(one) in above or len(above) > _DEEPEST or max(visits, len(found)) > MOST_NAMES:
            return
        for name, inner in _parts(one.state):
            if isinstance(inner, Pending):
                found[f"{prefix}{name}"] = inner
            elif isinstance(inner, Inert):
                look(f"{prefix}{name}.", inner, (*above, id(one)))

    look("", module, ())
    return found


def _parts(state: dict[Any, Any]) -> list[tuple[str, Any]]:
    if not isinstance(state.get("_modules"), dict):
        return [(name, value) for name, value in state.items() if isinstance(name, str)]
    passing = state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, set) else set()
    groups = [state.get(group) for group in ("_parameters", "_buffers", "_modules")]
    every = [item for group in groups if isinstance(group, dict) for item in dict.items(group)]
    return [(name, value) for name, value in every if isinstance(name, str) and name not in passing]

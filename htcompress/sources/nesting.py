"""Which of the mappings in a checkpoint is the model's state_dict, and what its names are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

KNOWN = ("state_dict", "model_state_dict", "model_state", "model")
"""Where training scripts put the state_dict beside an optimizer's and an epoch's."""

EXTRA_STATE = "_extra_state"
"""How the names end under which a state_dict keeps what modules give it by `get_extra_state`."""

MOST_NAMES = 1_000_000
_DEEPEST = 16
_LISTED_DEEP = 3

_TRAINING = re.compile(
    r"(^|_)(optim\w*|opt|sched|schedulers?|rng|amp|scaler|callbacks|loops|random)(_|s?$)", re.IGNORECASE
)
_AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?|shadow)(_|$)", re.IGNORECASE)


class TooDeepError(Exception):
    """Mappings in mappings without a sensible end; the text says it."""


@dataclass
class Found:
    """A state_dict: `entries` by dotted names, each a tensor or, for extra state, any value.

    Attributes:
        key: where it stands, dotted; empty at the top.
        source: the mapping itself where nothing was flattened, else None.
        others: the keys of state_dicts that could have been taken instead.
    """

    key: str
    entries: dict[str, Any]
    source: dict[Any, Any] | None
    others: tuple[str, ...] = ()


@dataclass
class _Look:
    """One look through a checkpoint; it knows which mappings hold tensors, each asked once."""

    is_tensor: Callable[[Any], bool]
    holds: dict[int, bool] = field(default_factory=dict)

    def nested(self, value: Any, depth: int = 0) -> bool:
        """Whether a mapping holds tensors, itself or in mappings within it."""
        if not isinstance(value, dict) or depth > _DEEPEST:
            return False
        if id(value) not in self.holds:
            self.holds[id(value)] = False  # of itself, where it holds itself
            self.holds[id(value)] = any(
                self.is_tensor(inner) or self.nested(inner, depth + 1) for inner in dict.values(value)
            )
        return self.holds[id(value)]

    def parts(self, mapping: dict[Any, Any]) -> dict[str, Any]:
        """The mappings within a mapping that may be state_dicts, by their keys."""
        return {
            str(key): value
            for key, value in dict.items(mapping)
            if self.nested(value) and not is_training(str(key), value) and not str(key).endswith(EXTRA_STATE)
        }


def is_training(key: str, value: Any) -> bool:
    """Whether an entry beside a state_dict is the state of an optimizer, a schedule, a scaler or random numbers."""
    return bool(_TRAINING.search(key)) or (isinstance(value, dict) and "param_groups" in value)


def find(loaded: Any, is_tensor: Callable[[Any], bool]) -> Found | None:
    """The state_dict that a checkpoint holds: at the top, under a known key, the only one, or all of several.

    Raises `TooDeepError` where mappings nest without a sensible end.
    """
    return _find(loaded, _Look(is_tensor), "")


def take(loaded: Any, key: str, is_tensor: Callable[[Any], bool]) -> Found | None:
    """The state_dict at a dotted key; None where there is none. Raises as `find`."""
    look = _Look(is_tensor)
    mapping = dict(listed(loaded, is_tensor)).get(key)
    if mapping is None:
        return None
    found = _find(mapping, look, key)
    return None if found is None else Found(found.key, found.entries, found.source)


def listed(loaded: Any, is_tensor: Callable[[Any], bool]) -> list[tuple[str, dict[Any, Any]]]:
    """The mappings with tensors that can be asked for, by dotted key, outer ones first."""
    look = _Look(is_tensor)
    found: list[tuple[str, dict[Any, Any]]] = []
    level = [("", loaded)] if look.nested(loaded) else []
    for _ in range(_LISTED_DEEP):
        below: list[tuple[str, dict[Any, Any]]] = []
        for key, mapping in level:
            below += [(_join(key, name), part) for name, part in look.parts(mapping).items()]
            if len(below) > MOST_NAMES:
                raise TooDeepError(f"has more than {MOST_NAMES} mappings in mappings")
        found += below
        level = below
    return found


def _find(loaded: Any, look: _Look, key: str, depth: int = 0) -> Found | None:
    if not look.nested(loaded) or depth > _DEEPEST:
        return None
    parts = look.parts(loaded)
    chosen = next((name for name in KNOWN if name in parts), None)
    plain = {name: part for name, part in parts.items() if not _AVERAGED.search(name)} or parts
    direct = [name for name, value in dict.items(loaded) if look.is_tensor(value) and not _is_count(name, value)]
    if chosen is None and len(plain) == 1 and not direct:
        chosen = next(iter(plain))
    if chosen is not None:
        found = _find(parts[chosen], look, _join(key, chosen), depth + 1)
        if found is not None:
            beside = tuple(_join(key, name) for name in parts if name != chosen)
            return Found(found.key, found.entries, found.source, (*beside, *found.others))
    entries: dict[str, Any] = {}
    left = [name for name in parts if name not in plain]
    for name, value in _flat(loaded, look, "", 0, left):
        if name in entries:
            raise TooDeepError(f"has two entries that are called {name[:80]!r}")
        entries[name] = value
        if len(entries) > MOST_NAMES:
            raise TooDeepError(f"has more than {MOST_NAMES} names")
    return Found(key, entries, None if parts else loaded, tuple(_join(key, name) for name in left))


def _flat(mapping: dict[Any, Any], look: _Look, prefix: str, depth: int, left: list[str]) -> Iterator[tuple[str, Any]]:
    if depth > _DEEPEST:
        raise TooDeepError(f"has mappings in mappings more than {_DEEPEST} deep")
    nests = any(look.nested(value) for value in dict.values(mapping))
    for key, value in dict.items(mapping):
        name = _join(prefix, str(key))
        if name.endswith(EXTRA_STATE) or (look.is_tensor(value) and not (nests and is_training(str(key), value))):
            yield name, value
        elif look.nested(value) and name not in left and not is_training(str(key), value):
            yield from _flat(value, look, name, depth + 1, left)


def _is_count(name: Any, value: Any) -> bool:
    """Whether a tensor beside a state_dict is an epoch or a loss: one number, of no module."""
    return "." not in str(name) and tuple(value.size) == ()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

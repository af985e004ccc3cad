"""JSON values as dataclasses, by the types of their fields: what does not fit is refused, and told by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")

MOST = 1 << 62
"""No number of a report is larger; views compute with them."""

DEEPEST = 64
"""How deep lists and objects may nest."""


@dataclass(frozen=True)
class AtLeast:
    """The least that a number may be."""

    value: int


Count = Annotated[int, AtLeast(0)]
"""A whole number of things."""


def parsed(text: str) -> Any:
    """The JSON value of a text.

    Raises `ValueError` or `RecursionError` where it is none, or has numbers or characters that are none.
    """
    data = json.loads(text, parse_constant=_no_number, parse_float=_real, parse_int=_whole)
    stack = [(data, 0)]
    while stack:
        part, depth = stack.pop()
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST}")
        if isinstance(part, dict):
            stack += [(inner, depth + 1) for inner in (*part, *part.values())]
        elif isinstance(part, list):
            stack += [(inner, depth + 1) for inner in part]
        elif isinstance(part, str) and not part.isascii():
            _ = part.encode("utf-8")  # half of a pair of surrogates is no character
    return data


def _no_number(text: str) -> float:
    raise ValueError(f"it has {text} where JSON has numbers or null")


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has {text[:20]}, which is no finite number")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > MOST:
        raise ValueError(f"it has the number {text[:20]}..., larger than anything that is counted")
    return int(text)


def typed(cls: type[Made], data: Any) -> Made:
    """A dataclass from a JSON object.

    Raises:
        KeyError: a field without a default is not there.
        TypeError: there is an unknown one, or a value is not of its field's type.
    """
    if not isinstance(data, dict):
        raise TypeError(f"it has {shown(data)} in place of {cls.__name__}; expected an object")
    hints = get_type_hints(cls, include_extras=True)
    unknown = [name for name in data if name not in hints]
    if unknown:
        raise TypeError(f"{unknown[0][:80]} in {cls.__name__} is not known")
    assert is_dataclass(cls)
    for field in fields(cls):
        if field.name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise KeyError(field.name)
    return cls(**{name: _value(hints[name], value, name) for name, value in data.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """A value as its field's type has it: lists are tuples. Raises `TypeError` where it is of another."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        made = _value(arguments[0], value, name)
        if made < arguments[1].value:
            raise TypeError(f"{name} is {shown(value)}; expected at least {arguments[1].value}")
        return made
    if origin in (UnionType, Union):
        option = next((k for k in arguments if _fits(k, value)), None)
        if option is None:
            raise _unfit(arguments, value, name)
        return _value(option, value, name)
    if kind is Any:
        return value
    if not _fits(kind, value):
        raise _unfit((kind,), value, name)
    if is_dataclass(kind) and isinstance(kind, type):
        return typed(kind, value)
    if origin is dict:
        return {key: _value(arguments[1], inner, f"{name}.{key[:40]}") for key, inner in value.items()}
    if origin is tuple and arguments[-1] is Ellipsis:
        return tuple(_value(arguments[0], inner, name) for inner in value)
    if origin is tuple:
        if len(value) != len(arguments):
            raise TypeError(f"{name} is {shown(value)}; expected {len(arguments)} values")
        return tuple(_value(k, inner, name) for k, inner in zip(arguments, value, strict=True))
    return value


def _fits(kind: Any, value: Any) -> bool:
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else get_origin(kind) or kind
    if is_dataclass(plain):
        plain = dict
    if isinstance(value, bool):
        return plain in (bool, Any)
    # JSON does not part 1 from 1.0, and has no tuples.
    also = {float: int, tuple: list}.get(plain)
    return plain is Any or isinstance(value, plain if also is None else (plain, also))


def _unfit(kinds: Iterable[Any], value: Any, name: str) -> TypeError:
    def word(kind: Any) -> str:
        plain = get_args(kind)[0] if get_origin(kind) is Annotated else get_origin(kind) or kind
        if plain is NoneType:
            return "null"
        return "dict" if is_dataclass(plain) else str(plain.__name__)

    return TypeError(f"{name} is {shown(value)}; expected {' or '.join(map(word, kinds))}")


def shown(value: Any) -> str:
    """A JSON value in a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

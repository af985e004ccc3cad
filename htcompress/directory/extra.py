"""The extra state of modules (torch's `get_extra_state`) as JSON values and tensors: nothing is pickled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from htcompress.errors import CheckpointError

_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}


def encoded_extra(name: str, value: Any) -> tuple[Any, dict[str, Tensor]]:
    """What stands for a value in `config.json`, and the tensors in it, by the names they are stored under.

    >>> encoded_extra("bn._extra_state", {"steps": 3, "scale": (1.5, None)})
    ({'dict': [['steps', 3], ['scale', {'tuple': [1.5, None]}]]}, {})

    Raises `CheckpointError` where a part of it is neither a number, a text, a tensor nor a container of them.
    """
    tensors: dict[str, Tensor] = {}

    def encode(part: Any) -> Any:
        if part is None or isinstance(part, bool | int | str) or (isinstance(part, float) and math.isfinite(part)):
            return part
        if isinstance(part, float):
            return {"float": str(part)}
        if isinstance(part, Tensor):
            key = f"{name}:{len(tensors)}"
            tensors[key] = part.detach().cpu().clone().contiguous()
            return {"tensor": key}
        if isinstance(part, bytes):
            return {"bytes": part.hex()}
        if isinstance(part, Mapping):
            return {"dict": [[encode(key), encode(inner)] for key, inner in part.items()]}
        for kind, cls in _CONTAINERS.items():
            if isinstance(part, cls):
                return {kind: [encode(inner) for inner in part]}
        raise CheckpointError(
            f"The extra state {name} of the model holds a {type(part).__name__}, which cannot be stored without "
            f"pickling. Let get_extra_state() return numbers, text, tensors, and lists, tuples or dicts of them."
        )

    return encode(value), tensors


def decoded_extra(encoded: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `encoded_extra`. Raises `KeyError` or `ValueError` where it is none."""
    if not isinstance(encoded, dict):
        return encoded
    ((kind, inner),) = encoded.items()
    if kind == "float":
        return float(inner)
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {decoded_extra(key, tensors): decoded_extra(value, tensors) for key, value in inner}
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](decoded_extra(value, tensors) for value in inner)
    raise ValueError(f"extra state of the kind {kind!r}")


def inner_tensors(encoded: Any) -> set[str]:
    """The names of the tensors in an encoded value."""
    if isinstance(encoded, dict):
        ((kind, inner),) = encoded.items()
        return {inner} if kind == "tensor" else inner_tensors(inner)
    return set().union(*map(inner_tensors, encoded)) if isinstance(encoded, list) else set()

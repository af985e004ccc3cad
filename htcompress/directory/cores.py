"""The cores of an output directory through their codecs: what is stored, and what it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from htcompress.storage import Codec, codec_of


def encoded(config: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its cores as they are stored; one that stands under two names is one tensor still."""
    known: dict[Any, dict[str, Tensor]] = {}
    for name, codec in _coded(config):
        core = state.get(name)
        if isinstance(core, Tensor) and _memory(core) not in known:
            known[_memory(core)] = codec.encode(core)
    stored: dict[str, Any] = {}
    for name, value in state.items():
        parts = known.get(_memory(value)) if isinstance(value, Tensor) else None
        stored |= {name: value} if parts is None else {_named(name, part): tensor for part, tensor in parts.items()}
    return stored


def decoded(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its cores as numbers; the inverse of `encoded`. Raises `KeyError` where a part is missing."""
    known: dict[Any, Tensor | None] = {}
    for name, codec in _coded(config):
        if name in stored:
            parts = {part: stored[_named(name, part)] for part in codec.parts((1,))}
            core = codec.decode(parts)
            known |= {_memory(tensor): None if part else core for part, tensor in parts.items()}
    state: dict[str, Any] = {}
    for name, value in stored.items():
        core_or_part = known.get(_memory(value), value) if isinstance(value, Tensor) else value
        if core_or_part is not None:
            state[name] = core_or_part
    return state


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers lie: two names of one tensor have one memory."""
    return tensor.data_ptr() if tensor.numel() else id(tensor), tuple(tensor.shape), tensor.dtype


def _named(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def _coded(config: Mapping[str, Any]) -> Iterator[tuple[str, Codec]]:
    """The names of cores and biases that are not stored as they are, and their codecs."""
    for layer_name, layer in config["layers"].items():
        for name in [layer_name, *layer.get("also", [])]:
            for direction, weights in layer["weights"].items():
                prefix = f"{name}.gates.{direction}" if name else f"gates.{direction}"
                for tensor, coded in weights.get("codecs", {}).items():
                    yield f"{prefix}.{tensor}", codec_of(coded["name"])

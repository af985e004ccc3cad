"""The cores of an output directory through their codecs: what is stored, and what it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from htcompress.directory.structure import stored_shapes
from htcompress.storage import Codec, codec_of
from htcompress.storage.integer import kept


def encoded(config: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its cores as they are stored; one that stands under two names is one tensor still."""
    known: dict[Any, dict[str, Tensor]] = {}
    beside: set[str] = set()
    for name, codec in _coded(config):
        core = state.get(name)
        beside.add(scales := _named(name, "scales"))
        if isinstance(core, Tensor) and _memory(core) not in known:
            known[_memory(core)] = codec.encode(core, state.get(scales))
    stored: dict[str, Any] = {}
    for name, value in state.items():
        parts = known.get(_memory(value)) if isinstance(value, Tensor) else None
        if parts is not None:
            stored |= {_named(name, part): tensor for part, tensor in parts.items()}
        elif name not in beside:
            stored[name] = value
    return stored


def decoded(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its cores as numbers, and the scales that are kept of them; the inverse of `encoded`.

    Raises `KeyError` where a part is missing.
    """
    known: dict[Any, Tensor] = {}
    state = dict(stored)
    shapes = stored_shapes(config)
    for name, codec in _coded(config):
        if name not in stored:
            continue
        key = _memory(stored[name])
        parts = {part: stored[_named(name, part)] for part in codec.parts(shapes[name])}
        if key not in known:
            known[key] = codec.decode(parts, shapes[name])
        state[name] = known[key]
        if "scales" in parts:
            state[_named(name, "scales")] = kept(parts["scales"])
    return state


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers lie: two names of one tensor have one memory."""
    return tensor.data_ptr() if tensor.numel() else id(tensor), tuple(tensor.shape), tensor.dtype


def _named(name: str, part: str) -> str:
    return f"{name}_{part}" if part else name


def _coded(config: Mapping[str, Any]) -> Iterator[tuple[str, Codec]]:
    """The names of cores and biases that are not stored as they are, and their codecs."""
    for layer_name, layer in config["layers"].items():
        for name in [layer_name, *layer.get("also", [])]:
            for direction, weights in layer["weights"].items():
                prefix = f"{name}.gates.{direction}" if name else f"gates.{direction}"
                for tensor, coded in weights.get("codecs", {}).items():
                    yield f"{prefix}.{tensor}", codec_of(coded)

"""The cores of an output directory through their codecs: what is stored, and what it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from htcompress.storage import Codec, codec_of


def encoded(config: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its cores as they are stored; one that stands under two names is one tensor still."""
    known: dict[int, dict[str, Tensor]] = {}

    def parts(codec: Codec, core: Tensor) -> dict[str, Tensor]:
        return known.setdefault(core.data_ptr() if core.numel() else id(core), codec.encode(core))

    stored = dict(state)
    for name, codec in _coded(config):
        if isinstance(core := stored.pop(name, None), Tensor):
            stored |= _named(name, parts(codec, core))
    return stored


def decoded(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its cores as numbers; the inverse of `encoded`."""
    state = dict(stored)
    for name, codec in _coded(config):
        if name in state:
            names = {part: name if not part else f"{name}.{part}" for part in codec.parts((1,))}
            state[name] = codec.decode({part: state.pop(full) for part, full in names.items()})
    return state


def _named(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name if not part else f"{name}.{part}": tensor for part, tensor in parts.items()}


def _coded(config: Mapping[str, Any]) -> Iterator[tuple[str, Codec]]:
    """The names of cores and biases that are not stored as they are, and their codecs."""
    for layer_name, layer in config["layers"].items():
        for name in [layer_name, *layer.get("also", [])]:
            for slot, weights in layer["weights"].items():
                prefix = f"{name}.gates.{slot}" if name else f"gates.{slot}"
                for tensor, coded in weights.get("codecs", {}).items():
                    yield f"{prefix}.{tensor}", codec_of(coded["name"])

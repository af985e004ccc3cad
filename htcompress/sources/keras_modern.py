"""Files of older versions of Keras as today's version loads them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from htcompress.sources import hdf5
from htcompress.sources.keras_file import CONFIG, KerasFile, with_member
from htcompress.sources.keras_layouts import Layout

_ENGINE = ("keras.src.engine.", "keras.engine.")
"""Where Keras 2 has kept the classes of models."""

_HELD = ("layer", "backward_layer", "cell", "cells")
"""Where the configuration of a layer has those of other layers: Keras 3 looks for their classes by module."""

SLASH = "\N{DIVISION SLASH}"
"""Stands for the slash in names, of which Keras 3 takes none."""

_CUDNN = {"CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}


def modernised(file: KerasFile) -> bytes:
    """The bytes of a whole model in which layers of CuDNN are plain ones, and settings that are no more are left out.

    Those of other files are as they were.
    """
    config = _without_slashes(_modern(file.config))
    if config == file.config:
        return file.content
    if file.suffix != ".h5":
        return with_member(file.content, CONFIG, json.dumps(config).encode())
    stream = io.BytesIO(file.content)
    with hdf5.opened(stream, file.path, "r+") as opened:
        opened.attrs["model_config"] = json.dumps(config)
        for layer in file.layers:
            for layout, places in layer.directions:
                if not layout.cudnn:
                    continue
                plain = Layout(layout.kind, biases=2 if layout.recurrence.keeps_candidate_bias else 1)
                made = plain.from_torch(layout.to_torch([opened[place][()] for place in places]))
                for place, array in zip(places, made, strict=True):
                    del opened[place]
                    opened[place] = array
    return stream.getvalue()


def _modern(node: Any) -> Any:
    """The same configuration without what only older versions know."""
    if isinstance(node, list):
        return [_modern(part) for part in node]
    if not isinstance(node, Mapping):
        return node
    made = {key: _modern(value) for key, value in node.items()}
    config, cls = made.get("config"), made.get("class_name")
    if cls == "Sequential":
        given = node["config"].get("layers") if isinstance(config, dict) else node["config"]
        layers = config.get("layers") if isinstance(config, dict) else config
        if isinstance(layers, list):
            layers[:0] = _input(given)
        if isinstance(config, list):
            # Until Keras 2.2 the configuration was the list alone.
            made["config"] = config = {"name": "sequential", "layers": config}
    if not isinstance(config, dict):
        return made
    if isinstance(config.get("layers"), list):
        _count_from_zero(config)
    for held in _HELD:
        for inner in config[held] if isinstance(config.get(held), list) else [config.get(held)]:
            if isinstance(inner, dict) and "class_name" in inner:
                inner.setdefault("module", "keras.layers")
                inner.setdefault("registered_name", None)
    for module in _ENGINE:
        if str(made.get("module")).startswith(module):
            made["module"] = f"keras.src.models.{made['module'].removeprefix(module)}"
    shape = config.pop("batch_input_shape", None)
    if shape is not None and cls == "InputLayer":
        config["batch_shape"] = shape
    if config.get("time_major") is False:
        del config["time_major"]
    if cls in _CUDNN:
        made["class_name"] = _CUDNN[cls]
        if cls == "CuDNNGRU":
            config["reset_after"] = True
    elif cls == "GRU":
        # Until TensorFlow 2 that was what it did, and files did not say so.
        config.setdefault("reset_after", False)
    return made


def _input(layers: list[Any]) -> list[Any]:
    """What a Sequential begins with where its first layer bears the shape of the inputs, as Keras 2 let it."""
    first = layers[0] if layers else None
    if not isinstance(first, Mapping) or first.get("class_name") == "InputLayer":
        return []
    config = first.get("config")
    if not isinstance(config, dict) or "batch_input_shape" not in config:
        return []
    shape, dtype = config["batch_input_shape"], config.get("dtype")
    told = {"dtype": dtype} if isinstance(dtype, str) else {}
    name = f"{config.get('name', 'first')}_input"
    return [{"class_name": "InputLayer", "config": {"batch_shape": shape, "name": name, **told}}]


def _count_from_zero(config: dict[str, Any]) -> None:
    """Let the calls of models in a model be counted from zero; to Keras 2 the first was their making."""
    inner = {layer.get("name") for layer in config["layers"] if isinstance(layer, Mapping) and _is_model(layer)}
    called = [layer.get("inbound_nodes") for layer in config["layers"] if isinstance(layer, Mapping)]
    found = list(_references([*called, config.get("input_layers"), config.get("output_layers")]))
    for name in inner:
        own = [reference for reference in found if reference[0] == name]
        if own and all(reference[1] > 0 for reference in own):
            for reference in own:
                reference[1] -= 1


def _without_slashes(node: Any) -> Any:
    """The same with names of layers as Keras 3 takes them; it finds weights by their order."""
    names = {name: name.replace("/", SLASH) for name in _names(node) if "/" in name}

    def renamed(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: renamed(value) for key, value in part.items()}
        if isinstance(part, list):
            return [renamed(value) for value in part]
        return names.get(part, part) if isinstance(part, str) else part

    return renamed(node) if names else node


def _names(node: Any) -> Iterator[str]:
    """The names of all layers in a configuration."""
    if isinstance(node, Mapping):
        own = node.get("config")
        if "class_name" in node and isinstance(own, Mapping) and isinstance(own.get("name"), str):
            yield own["name"]
    for part in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from _names(part)


def _is_model(layer: Mapping[str, Any]) -> bool:
    """Whether a layer is a model of layers."""
    config = layer.get("config")
    return isinstance(config, list) or (isinstance(config, Mapping) and isinstance(config.get("layers"), list))


def _references(node: Any) -> Iterator[list[Any]]:
    """What refers to the output of a call: a layer's name, the number of the call, that of the output."""
    if not isinstance(node, list):
        return
    if len(node) >= 3 and isinstance(node[0], str) and all(type(number) is int for number in node[1:3]):
        yield node
        return
    for part in node:
        yield from _references(part)

"""Files of older versions of Keras as today's version loads them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from htcompress.sources import hdf5
from htcompress.sources.keras_file import KerasFile
from htcompress.sources.keras_layouts import Layout

_CUDNN = {"CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}


def modernised(file: KerasFile) -> bytes:
    """The bytes of a whole model in which layers of CuDNN are plain ones, and settings that are no more are left out.

    Those of other files are as they were.
    """
    config = _modern(file.config)
    if config == file.config or file.suffix != ".h5":
        return file.content
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
        layers = config.get("layers") if isinstance(config, dict) else config
        if isinstance(layers, list):
            layers[:0] = _input(layers)
    if not isinstance(config, dict):
        return made
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
    shape, dtype = config.pop("batch_input_shape"), config.get("dtype")
    told = {"dtype": dtype} if isinstance(dtype, str) else {}
    name = f"{config.get('name', 'first')}_input"
    return [{"class_name": "InputLayer", "config": {"batch_shape": shape, "name": name, **told}}]

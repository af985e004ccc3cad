"""Files of Keras written by hand with h5py, and what the layers in them compute by Keras's documented equations."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

INPUTS, UNITS, BATCH, STEPS = 6, 5, 3, 7
GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1, "CuDNNLSTM": 4, "CuDNNGRU": 3}

Array = np.ndarray


def arrays_of(
    cls: str, rng: np.random.Generator, inputs: int = INPUTS, units: int = UNITS, **config: Any
) -> list[Array]:
    """Random weights of a layer: kernel, recurrent kernel, bias."""
    rows = GATES[cls] * units
    bias = {"CuDNNLSTM": (2 * rows,), "CuDNNGRU": (2 * rows,), "GRU": (2, rows)}.get(cls, (rows,))
    if config.get("reset_after") is False:
        bias = (rows,)
    shapes = [(inputs, rows), (units, rows), bias][: 3 if config.get("use_bias", True) else 2]
    return [rng.standard_normal(shape).astype(np.float32) * 0.5 for shape in shapes]


def layer(cls: str, name: str, **config: Any) -> dict[str, Any]:
    """The configuration of a layer."""
    return {"class_name": cls, "config": {"name": name, **config}}


def model(*layers: Mapping[str, Any], name: str = "model", cls: str = "Sequential") -> dict[str, Any]:
    """The configuration of a model of layers."""
    return layer(cls, name, layers=list(layers))


WEIGHTS = ("kernel", "recurrent_kernel", "bias")


def named(owner: str, arrays: Sequence[Array], names: Sequence[str] = WEIGHTS) -> dict[str, Array]:
    """Arrays as Keras 2 calls them: `lstm/lstm_cell/kernel:0`."""
    return {f"{owner}/{name}:0": array for name, array in zip(names, arrays, strict=False)}


def legacy(
    path: Path, layers: Mapping[str, Mapping[str, Array]], config: Any = None, *, chunks: int = 0, **beside: Array
) -> Path:
    """A file of Keras 2: a whole model where there is a configuration, else weights alone.

    Args:
        chunks: into how many parts the list of layers is cut, as Keras cuts long ones.
        beside: the state of an optimizer.
    """
    with h5py.File(path, "w") as file:
        root = file
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
            file.attrs["keras_version"] = "2.2.4"
            root = file.create_group("model_weights")
        names = [name.encode() for name in layers]
        for k, part in enumerate(np.array_split(np.array(names), chunks) if chunks else [np.array(names)]):
            root.attrs[f"layer_names{k}" if chunks else "layer_names"] = part
        for name, arrays in layers.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = [weight.encode() for weight in arrays]
            for weight, array in arrays.items():
                group[weight] = array
        for weight, array in beside.items():
            file[f"optimizer_weights/Adam/{weight}"] = array
    return path


def modern(
    path: Path, groups: Mapping[str, Sequence[Array]], config: Any = None, names: Mapping[str, str] | None = None
) -> Path:
    """A file of Keras 3: `.keras` where there is a configuration, else `.weights.h5`.

    Args:
        groups: the arrays by where they stand (`layers/lstm/cell`).
        names: those of layers, which newer files note.
    """
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for place, arrays in groups.items():
            for k, array in enumerate(arrays):
                file[f"{place}/vars/{k}"] = array
        for place, name in (names or {}).items():
            file.require_group(f"{place}/vars").attrs["name"] = name
        file["optimizer/vars/0"] = np.zeros(3, np.float32)
    if config is None:
        path.write_bytes(stream.getvalue())
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"}))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", stream.getvalue())
    return path


# ---- what layers compute ----------------------------------------------------------------------------------------


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def plain(cls: str, arrays: Sequence[Array]) -> list[Array]:
    """The weights of CuDNNLSTM and CuDNNGRU as LSTM and GRU take them: Keras 2's own conversion of such files."""
    if not cls.startswith("CuDNN"):
        return list(arrays)
    gates = GATES[cls]
    kernel = np.hstack([k.T.reshape(k.shape, order="F") for k in np.hsplit(arrays[0], gates)])
    recurrent = np.hstack([k.T for k in np.hsplit(arrays[1], gates)])
    bias = arrays[2].reshape(2, -1)
    return [kernel, recurrent, bias.sum(0) if cls == "CuDNNLSTM" else bias]


def hard_sigmoid(x: Array) -> Array:
    """That of Keras before version 3."""
    return np.clip(0.2 * x + 0.5, 0, 1)


def run(
    cls: str,
    arrays: Sequence[Array],
    x: Array,
    activation: str = "tanh",
    mask: Array | None = None,
    gate: Callable[[Array], Array] | None = None,
) -> Array:
    """The outputs (batch, time, units) of a layer; where a step is masked, state and output are those before it.

    A GRU with one bias multiplies its reset gate before the matrix; one with two, or none, after it.
    """
    gate = _sigmoid if gate is None else gate
    kernel, recurrent, *rest = (a.astype(np.float64) for a in plain(cls, arrays))
    units = recurrent.shape[0]
    bias = rest[0] if rest else np.zeros(kernel.shape[1])
    act = {"tanh": np.tanh, "relu": lambda v: np.maximum(v, 0)}[activation]
    h = c = np.zeros((len(x), units))
    found = []
    for t in range(x.shape[1]):
        if cls.endswith("LSTM"):
            i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, axis=1)
            new_c = gate(f) * c + gate(i) * act(g)
            new = gate(o) * act(new_c)
        elif cls.endswith("GRU"):
            own, state = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
            xz, xr, xh = np.split(x[:, t] @ kernel + own, 3, axis=1)
            hz, hr, hh = np.split(h @ recurrent + state, 3, axis=1)
            z, r = gate(xz + hz), gate(xr + hr)
            candidate = r * hh if len(arrays) < 3 or bias.ndim == 2 else (r * h) @ recurrent[:, 2 * units :]
            new, new_c = z * h + (1 - z) * act(xh + candidate), c
        else:
            new, new_c = act(x[:, t] @ kernel + h @ recurrent + bias), c
        kept = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        h, c = np.where(kept, new, h), np.where(kept, new_c, c)
        found.append(h)
    return np.stack(found, axis=1)

"""Weights of SavedModels: the table that TensorFlow writes is read without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keras_files import INPUTS, WEIGHTS, Array, arrays_of, layer, model, run

from htcompress.errors import CheckpointError, HTCompressError
from htcompress.sources.read import read_checkpoint

MAGIC = 0xDB4775248B80FB57
"""The last bytes of a table (tensorflow/core/lib/io/format.h)."""


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def message(**fields: int | bytes) -> bytes:
    """A message of protobuf: fields by their numbers (`f1`, ...)."""
    found = b""
    for name, value in fields.items():
        number = int(name[1:]) << 3
        found += (
            varint(number) + varint(value)
            if isinstance(value, int)
            else varint(number | 2) + varint(len(value)) + value
        )
    return found


def block(entries: Mapping[bytes, bytes]) -> bytes:
    """A block of a table; names share what they begin with alike."""
    found, before = b"", b""
    for name in sorted(entries):
        shared = next(
            (k for k, (a, b) in enumerate(zip(name, before, strict=False)) if a != b), min(len(name), len(before))
        )
        value = entries[name]
        found += varint(shared) + varint(len(name) - shared) + varint(len(value)) + name[shared:] + value
        before = name
    return found + bytes(4) + (1).to_bytes(4, "little") + bytes(5)


def table(entries: Mapping[bytes, bytes]) -> bytes:
    data = block(entries)
    index = block({b"~": varint(0) + varint(len(data) - 5)})
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(index) - 5)
    return data + index + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def graph_of(paths: Mapping[str, str]) -> bytes:
    """The objects of a model as TensorFlow lists them: the way to each value, and its key in the table."""
    children: list[dict[str, int]] = [{}]
    keys: dict[int, str] = {}
    for path, key in paths.items():
        at = 0
        for step in path.split("/"):
            if step not in children[at]:
                children[at][step] = len(children)
                children.append({})
            at = children[at][step]
        keys[at] = key
    # Keras keeps all values once more in a list, and layers once more by their number.
    children[0]["variables"] = len(children)
    children.append({str(k): at for k, at in enumerate(keys)})
    children[0]["layer-0"] = children[0]["layer_with_weights-0"]
    found = b""
    for number, own in enumerate(children):
        said = b"".join(message(f1=message(f1=child, f2=name.encode())) for name, child in own.items())
        if number in keys:
            said += message(f2=message(f1=b"VARIABLE_VALUE", f2=b"name", f3=keys[number].encode()))
        found += message(f1=said)
    return varint(len(found)) + bytes(4) + found


def saved(folder: Path, arrays: Mapping[str, Array], nodes: Mapping[str, Any], *, graph: bool = True) -> Path:
    """A SavedModel of Keras 2, without its graph of operations.

    Args:
        graph: whether it holds the graph of objects, and calls arrays after their shortest way; else after the whole.
    """
    (folder / "variables").mkdir(parents=True)
    data, entries = b"", {b"": message(f1=1)}
    keys = {}
    for k, (name, array) in enumerate(arrays.items()):
        sizes = b"".join(message(f2=message(f1=size)) for size in array.shape)
        entry = message(f1={"float32": 1, "int64": 9}[array.dtype.name], f2=sizes, f4=len(data), f5=array.nbytes)
        keys[name] = f"{f'variables/{k}' if graph and name.count('/') > 1 else name}/.ATTRIBUTES/VARIABLE_VALUE"
        entries[keys[name].encode()] = entry
        data += array.tobytes()
    if graph:
        told = graph_of(keys)
        entries[b"_CHECKPOINTABLE_OBJECT_GRAPH"] = message(f1=7, f2=b"", f4=len(data), f5=len(told))
        data += told
    (folder / "variables" / "variables.index").write_bytes(table(entries))
    (folder / "variables" / "variables.data-00000-of-00001").write_bytes(data)
    described = [
        message(f1=message(f2=k, f3=f"root.{path}".encode(), f4=b"_tf_keras_layer", f5=json.dumps(node).encode()))
        for k, (path, node) in enumerate(nodes.items())
    ]
    (folder / "keras_metadata.pb").write_bytes(b"".join(described))
    (folder / "saved_model.pb").write_bytes(b"\x08\x01")
    return folder


def small(folder: Path, *, graph: bool = True) -> tuple[Path, dict[str, list[Array]]]:
    rng = np.random.default_rng(0)
    weights = {"rec": arrays_of("LSTM", rng), "bi": arrays_of("GRU", rng), "back": arrays_of("GRU", rng),
               "inner": arrays_of("SimpleRNN", rng)}  # fmt: skip
    dense = rng.standard_normal((5, 2)).astype(np.float32)
    places = {
        "rec": "layer_with_weights-0/cell",
        "bi": "layer_with_weights-1/forward_layer/cell",
        "back": "layer_with_weights-1/backward_layer/cell",
        "inner": "layer_with_weights-2/layer_with_weights-0/cell",
    }
    arrays = {f"{places[name]}/{w}": a for name, own in weights.items() for w, a in zip(WEIGHTS, own, strict=True)}
    arrays |= {"layer_with_weights-3/kernel": dense, "optimizer/iter": np.array(3, np.int64)}
    nodes = {
        "layer_with_weights-0": layer("LSTM", "rec"),
        "layer_with_weights-1": layer("Bidirectional", "bi", layer=layer("GRU", "gru", reset_after=True)),
        "layer_with_weights-1.forward_layer": layer("GRU", "forward_gru", reset_after=True),
        "layer_with_weights-1.backward_layer": layer("GRU", "backward_gru", reset_after=True, go_backwards=True),
        "layer_with_weights-2": model(layer("SimpleRNN", "rnn"), name="inner"),
        "layer_with_weights-2.layer_with_weights-0": layer("SimpleRNN", "rnn"),
        "layer_with_weights-3": layer("Dense", "out"),
    }
    return saved(folder, arrays, nodes, graph=graph), {**weights, "out": [dense]}


@pytest.mark.parametrize("graph", [True, False])
def test_read(tmp_path: Path, graph: bool) -> None:
    folder, weights = small(tmp_path / "m", graph=graph)
    tensors = read_checkpoint(folder).tensors
    x = np.random.default_rng(1).standard_normal((3, 7, INPUTS)).astype(np.float32)
    for name, cls, made, wanted in (
        ("rec", "LSTM", torch.nn.LSTM(INPUTS, 5, batch_first=True), None),
        ("inner.rnn", "SimpleRNN", torch.nn.RNN(INPUTS, 5, batch_first=True), run("SimpleRNN", weights["inner"], x)),
        (
            "bi", "GRU", torch.nn.GRU(INPUTS, 5, batch_first=True, bidirectional=True),
            np.concatenate([run("GRU", weights["bi"], x), run("GRU", weights["back"], x[:, ::-1])[:, ::-1]], axis=2),
        ),
    ):  # fmt: skip
        made.load_state_dict({n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")})
        with torch.no_grad():
            found = made(torch.from_numpy(x))[0].numpy()
        assert np.abs(found - (run(cls, weights[name], x) if wanted is None else wanted)).max() < 1e-5
    assert np.array_equal(tensors["out.weight"].numpy(), weights["out"][0].T)
    assert len(tensors) == 4 + 4 + 8 + 1


def test_what_cannot_be_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", {"variables/0": np.zeros((6, 20), np.float32)}, {}, graph=False)
    with pytest.raises(CheckpointError, match="whose recurrent layers cannot be told"):
        read_checkpoint(folder)


def test_damaged_files_end_in_words(tmp_path: Path) -> None:
    folder, _ = small(tmp_path / "m")
    draw = np.random.default_rng(0)
    for name in ("variables/variables.index", "variables/variables.data-00000-of-00001", "keras_metadata.pb"):
        content = (folder / name).read_bytes()
        for cut in range(0, len(content), len(content) // 13):
            (folder / name).write_bytes(content[:cut])
            with suppress(HTCompressError):
                read_checkpoint(folder)
        for _ in range(60):
            broken = bytearray(content)
            for place in draw.integers(0, len(content), 6):
                broken[place] = draw.integers(256)
            (folder / name).write_bytes(broken)
            with suppress(HTCompressError):
                read_checkpoint(folder)
        (folder / name).write_bytes(content)
    (folder / "variables/variables.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointError, match="the data of part 0 is missing"):
        read_checkpoint(folder)

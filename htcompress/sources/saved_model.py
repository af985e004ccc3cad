"""The weights of a SavedModel of Keras 2, read without TensorFlow.

They stand in `variables/`: a sorted table (that of LevelDB) of names, each with the type, the shape and the place of
its numbers in a file of data. `keras_metadata.pb` says which layers the names belong to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from htcompress.errors import CheckpointError
from htcompress.sources.checkpoint import Checkpoint, checked_name, first_line
from htcompress.sources.keras_config import Spec
from htcompress.sources.keras_layers import Reading, layers_of, others_of, tensors_of
from htcompress.sources.keras_parts import BACKWARD, FORWARD, Part

INDEX = Path("variables") / "variables.index"
METADATA = "keras_metadata.pb"

_MAGIC = bytes.fromhex("57fb808b247547db")
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_BESIDE = ("optimizer", "keras_api", "save_counter")
_ASIDE = re.compile(r"optimizer|keras_api|save_counter|signatures|((non_)?trainable_)?variables|layer-")
"""What leads from an object to others that are not part of it, or are reached by a better name."""

_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2", 10: "?"}
"""TensorFlow's numbers for types of numbers."""

_ORDER = ("kernel", "recurrent_kernel", "bias")
_MOST_INDEX = 1 << 28


class _DamagedError(Exception):
    """The files are not what they should be; the text says what."""


@dataclass(frozen=True)
class _Entry:
    """Where an array stands: the number of the file of data, and the place in it. Text has no type."""

    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def is_saved_model(folder: Path) -> bool:
    """Whether a folder holds a SavedModel, or the variables of one."""
    return (folder / INDEX).is_file()


def read_saved_model(folder: Path) -> Checkpoint:
    """The weights of a SavedModel by torch's names, in torch's layouts.

    Raises `CheckpointError` where it is damaged, or does not say which layers its weights belong to.
    """
    index, described = folder / INDEX, folder / METADATA
    try:
        content = _bounded(index)
        entries = {name: _entry(value) for name, value in _table(content) if name}
        nodes = _nodes(_bounded(described)) if described.is_file() else {}
        shards = _shards(index.parent, entries)
        paths = _paths(entries, shards)
    except (_DamagedError, OSError, ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not a readable SavedModel ({first_line(error)}). It may be cut short; save or download it "
            f"again."
        ) from error
    kept = {key: entries[key] for key in paths}
    parts = list(_parts(paths, nodes))
    shapes = {name: entry.shape for name, entry in kept.items()}
    layers, left = layers_of(parts, shapes, Reading())
    others = others_of(parts, shapes, layers)
    if not layers:
        reasons = " ".join(f"{name} {reason}." for name, reason in left.items())
        raise CheckpointError(
            f"{folder} is a SavedModel whose recurrent layers cannot be told{': ' + reasons if reasons else '.'} Save "
            f'the model with model.save("model.keras") or "model.h5", and give that.'
        )

    def array(place: str) -> np.ndarray:
        entry = kept[place]
        data = shards[entry.shard][entry.offset : entry.offset + entry.size]
        return np.frombuffer(data, entry.dtype).reshape(entry.shape)

    tensors = {checked_name(name, folder): tensor for name, tensor in tensors_of(layers, others, array).items()}
    digest = hashlib.sha256(content + b"".join(hashlib.sha256(shard).digest() for shard in shards.values())).hexdigest()
    return Checkpoint(folder, digest, tensors, sum(map(len, shards.values())), left=left)


def _bounded(file: Path) -> bytes:
    if file.stat().st_size > _MOST_INDEX:
        raise _DamagedError(f"{file.name} is too large")
    return file.read_bytes()


def _shards(folder: Path, entries: Mapping[str, _Entry]) -> dict[int, bytes]:
    """The files of data; all arrays are in them."""
    found: dict[int, bytes] = {}
    for name, entry in entries.items():
        if entry.shard not in found:
            files = list(folder.glob(f"variables.data-{entry.shard:05}-of-*"))
            if len(files) != 1:
                raise _DamagedError(f"the data of part {entry.shard} is missing")
            found[entry.shard] = files[0].read_bytes()
        if entry.dtype and entry.size != prod(entry.shape) * np.dtype(entry.dtype).itemsize:
            raise _DamagedError(f"{name} has {entry.size} bytes for the shape {entry.shape}")
        if entry.offset + entry.size > len(found[entry.shard]):
            raise _DamagedError(f"the data ends before {name}")
    return found


# ---- whose weights they are -----------------------------------------------------------------------------------


def _paths(entries: Mapping[str, _Entry], shards: Mapping[int, bytes]) -> dict[str, tuple[str, ...]]:
    """The arrays of layers, and where each is in the model: the way to it from the top, attribute by attribute."""
    stored = {key for key, entry in entries.items() if entry.dtype and key.endswith(_VALUE)}
    if _GRAPH not in entries:
        return {key: tuple(key.removesuffix(_VALUE).split("/")) for key in stored if not key.startswith(_BESIDE)}
    entry = entries[_GRAPH]
    data = shards[entry.shard][entry.offset : entry.offset + entry.size]
    length, at = _varint(data, 0)
    objects = [_object(value) for number, value in _fields(data[at + 4 : at + 4 + length]) if number == 1]
    found: dict[str, tuple[str, ...]] = {}
    seen = {0}
    level: list[tuple[int, tuple[str, ...]]] = [(0, ())] if objects else []
    while level:
        below: list[tuple[int, tuple[str, ...]]] = []
        for number, path in level:
            children, key = objects[number]
            if key in stored:
                found[key] = path
            for name, child in sorted(children.items()):
                if child not in seen and child < len(objects) and not _ASIDE.match(name):
                    seen.add(child)
                    below.append((child, (*path, name)))
        level = below
    return found


def _object(message: int | bytes) -> tuple[dict[str, int], str]:
    """An object of the graph: the numbers of its children by their names, and the key of its value, if it has one."""
    children, key = {}, ""
    for number, value in _fields(_bytes(message)):
        inner = dict(_fields(_bytes(value))) if number in (1, 2) else {}
        if number == 1:
            children[_bytes(inner.get(2, b"")).decode()] = int(inner.get(1, 0))
        elif number == 2 and inner.get(1) == b"VARIABLE_VALUE":
            key = _bytes(inner.get(3, b"")).decode()
    return children, key


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _DamagedError("a message has a number where it should have another message")
    return value


def _parts(paths: Mapping[str, tuple[str, ...]], nodes: Mapping[str, Spec]) -> Iterator[Part]:
    owned: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for key, (*steps, name) in paths.items():
        owned.setdefault(tuple(steps), []).append((name, key))
    for owner, arrays in owned.items():
        arrays.sort(key=lambda array: _ORDER.index(array[0]) if array[0] in _ORDER else len(_ORDER))
        path: list[str] = []
        spec, direction, cell = None, "", False
        for depth, step in enumerate(owner, 1):
            found = nodes.get(".".join(owner[:depth]))
            cell = cell or step == "cell"
            if step in ("forward_layer", "backward_layer"):
                direction = FORWARD if step == "forward_layer" else BACKWARD
                spec = found or spec
            elif step == "layer" or cell:
                spec = found if found is not None and step == "layer" else spec
            else:
                spec = found
                path.append(step if found is None else found.name or step)
        names, places = (tuple(array[k] for array in arrays) for k in (0, 1))
        yield Part(tuple(path) or ("model",), places, names, spec, direction, cell=cell)


def _nodes(content: bytes) -> dict[str, Spec]:
    """What the metadata says of layers, by their paths from the model."""
    found: dict[str, Spec] = {}
    for number, node in _fields(content):
        if number != 1 or not isinstance(node, bytes):
            continue
        parts = {k: value for k, value in _fields(node) if isinstance(value, bytes)}
        path, told = parts.get(3, b"").decode(), parts.get(5, b"")
        if not path.startswith("root.") or not parts.get(4, b"").startswith(b"_tf_keras"):
            continue
        given = json.loads(told)
        if isinstance(given, dict) and isinstance(given.get("class_name"), str):
            try:
                spec = Spec.of(given)
            except ValueError:
                continue
            found[path.removeprefix("root.")] = replace(spec, name=str(given.get("name") or spec.name))
    return found


# ---- the table and its messages -------------------------------------------------------------------------------


def _table(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The names and values of a sorted table."""
    if len(content) < 48 or content[-8:] != _MAGIC:
        raise _DamagedError(f"{INDEX.name} is no table")
    footer = content[-48:]
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    for _, handle in _block(content, *_handle(footer, at)):
        for name, value in _block(content, *_handle(handle, 0)):
            yield name.decode("utf-8", "replace"), value


def _handle(content: bytes, at: int) -> tuple[int, int]:
    offset, at = _varint(content, at)
    size, _ = _varint(content, at)
    return offset, size


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Entries of a block, each name after what it shares with the one before."""
    if offset + size + 5 > len(content):
        raise _DamagedError("a block ends behind the file")
    if content[offset + size]:
        raise _DamagedError("its table is packed, which TensorFlow does not do")
    block = content[offset : offset + size]
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise _DamagedError("an entry ends behind its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _entry(message: bytes) -> _Entry:
    """Of a `BundleEntryProto`."""
    given = dict(_fields(message))
    shape = given.get(2, b"")
    numbers = [int(given.get(k, 0)) for k in (3, 4, 5)]
    kind = _TYPES.get(int(given.get(1, 0)), "")
    if not isinstance(shape, bytes) or not kind:
        return _Entry("", (), *numbers)
    sizes = []
    for number, dimension in _fields(shape):
        if number == 2 and isinstance(dimension, bytes):
            sizes.append(int(dict(_fields(dimension)).get(1, 0)))
    return _Entry(kind, tuple(sizes), *numbers)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message of protobuf."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _DamagedError("a message has a field of no known kind")
        if at + length > len(message):
            raise _DamagedError("a message ends too soon")
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next one begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _DamagedError("a number has no end")

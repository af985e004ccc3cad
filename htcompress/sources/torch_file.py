"""What `torch.save` writes, zip archives and the form before them: the objects, and their tensors where they lie."""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htcompress.sources import pickled
from htcompress.sources.objects import Pending, Storage

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_ALIGNED = 8  # bytes; older torch files put numbers anywhere
_MOST_DIMENSIONS = 64
_MOST_NUMBERS = 1 << 48
_REPEATED = 64
"""How many times the file's size its tensors may be, views that repeat numbers written out."""
_LEAST = 1 << 24


class DamagedError(Exception):
    """What a file of torch claims does not fit what it holds; the text says it, without the file's name."""


@dataclass(eq=False)
class TorchFile:
    """A file of torch: `loaded` with `Pending` tensors, `records` where the numbers of each storage lie (bytes)."""

    path: Path
    size: int
    loaded: Any
    records: dict[str, tuple[int, int]]
    swapped: bool = False
    _bytes: Any = None
    _whole: dict[str, torch.UntypedStorage] = field(default_factory=dict)
    _made: dict[int, tuple[Pending, Tensor]] = field(default_factory=dict)
    _spent: int = 0

    def tensor(self, pending: Pending) -> Tensor:
        """The tensor, over the file's own memory. Raises `DamagedError` where the file does not hold it."""
        if id(pending) not in self._made:
            self._made[id(pending)] = pending, self._read(pending)
        return self._made[id(pending)][1]

    def _read(self, pending: Pending) -> Tensor:
        if pending.storage is None or pending.dtype is None or (pending.kind and pending.quantizer is None):
            raise DamagedError(f"is {pending.kind}; expected a dense one. Save it with .to_dense(), or leave it out")
        offset, size, stride = _extent(pending)
        part = self._storage(pending.storage)
        length = part.nbytes()
        each = pending.dtype.itemsize
        count = prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if count else 0
        if last * each > length:
            raise DamagedError(
                f"of shape {size} reaches to number {last} of a storage of {length // each}; the file is damaged"
            )
        self._spend(count * each, size)
        if pending.quantizer is not None:
            typed = torch.storage.TypedStorage(wrap_storage=part, dtype=pending.dtype, _internal=True)
            quantizer = tuple(self.tensor(q) if isinstance(q, Pending) else q for q in pending.quantizer)
            made = torch._utils._rebuild_qtensor(typed, offset if last else 0, size, stride, quantizer, False, {})
            return made.detach()
        made = torch.empty(0, dtype=pending.dtype, device="cpu")
        return made.set_(part, offset if last else 0, size, stride)

    def _storage(self, storage: Storage) -> torch.UntypedStorage:
        """The bytes of a storage, where they lie; a copy where they cannot be used as they are."""
        each = storage.dtype.itemsize
        start, length = self.records.get(storage.key, (0, -1))
        if not 0 <= storage.claimed * each <= length:
            raise DamagedError(
                f"needs {storage.claimed * each} bytes of storage {storage.key[:20]!r}; the file has "
                f"{max(length, 0)}. It may be cut short"
            )
        if self._bytes is None:
            self._bytes = torch.UntypedStorage.from_file(str(self.path), False, self.size)
        length = storage.claimed * each
        if storage.key not in self._whole:
            whole: torch.UntypedStorage = self._bytes[start : start + length]
            if start % _ALIGNED or self.swapped:
                whole = whole.clone()
            if self.swapped:
                whole.byteswap(storage.dtype)
            self._whole[storage.key] = whole
        whole = self._whole[storage.key]
        if whole.nbytes() != length:
            raise DamagedError(f"names storage {storage.key[:20]!r} with another size than before; the file is damaged")
        if storage.view is None:
            return whole
        first, count = storage.view
        if min(first, count) < 0 or (first + count) * each > length:
            raise DamagedError("is a part of a storage that does not hold it; the file is damaged")
        part: torch.UntypedStorage = whole[first * each : (first + count) * each]
        return part

    def _spend(self, count: int, size: tuple[int, ...]) -> None:
        """Count what a tensor takes once it is written out."""
        self._spent += count
        if self._spent > max(_REPEATED * self.size, _LEAST):
            raise DamagedError(
                f"of shape {size} brings the tensors to {self._spent} bytes, in a file of {self.size}: they repeat "
                f"numbers (expand) beyond measure. Save them with .contiguous()"
            )


def _extent(pending: Pending) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Offset, shape and strides in numbers, once they make sense."""
    offset, size, stride = pending.offset, pending.size, pending.stride
    if not (isinstance(size, tuple | list) and isinstance(stride, tuple | list) and len(size) == len(stride)):
        raise DamagedError("has no shape; the file is damaged")
    numbers = [offset, *size, *stride]
    if any(type(n) is not int or not 0 <= n < _MOST_NUMBERS for n in numbers) or len(size) > _MOST_DIMENSIONS:
        raise DamagedError("has a shape that no tensor has; the file is damaged")
    if prod(n for n in size if n) >= _MOST_NUMBERS:
        raise DamagedError(f"has the shape {tuple(size)}, more numbers than any file holds; the file is damaged")
    return offset, tuple(size), tuple(stride)


class _Archive:
    """A zip archive whose entries lie in it as they are."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        with zipfile.ZipFile(path) as archive:
            self.entries = {entry.filename: entry for entry in archive.infolist()}

    def top(self, end: str) -> str:
        """The folder that an entry of a name lies in, one below the root."""
        depth = end.count("/") + 1
        found = next(name for name in self.entries if name.count("/") == depth and name.endswith(f"/{end}"))
        return found.removesuffix(f"/{end}")

    def record(self, name: str) -> tuple[int, int]:
        """Where the bytes of an entry begin, and how many they are."""
        entry = self.entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise DamagedError(
                "is a zip archive with compressed entries; torch stores them as they are. Unpack it and zip it "
                "again with zip -0, or save the model again"
            )
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            head = struct.unpack("<4s22xHH", file.read(30))
        start = entry.header_offset + 30 + head[1] + head[2]
        if head[0] != b"PK\3\4" or start + entry.file_size > self.size:
            raise DamagedError("is a zip archive whose entries do not fit it; it may be cut short")
        return start, entry.file_size

    def content(self, name: str, most: int) -> bytes:
        """The bytes of an entry that has no more than so many."""
        start, length = self.record(name)
        if length > most:
            raise DamagedError(f"has {length} bytes beside its tensors; expected at most {most}")
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def swapped(self, top: str) -> bool:
        """Whether numbers are in the other order of bytes than this machine's."""
        name = f"{top}/byteorder"
        order = self.content(name, 16).decode("ascii", "replace") if name in self.entries else "little"
        return order != sys.byteorder


def read_archive(path: Path, size: int) -> TorchFile:
    """A zip archive of torch. Raises `DamagedError`, `pickled.ForeignObjectError`, or what a damaged file brings."""
    archive = _Archive(path, size)
    top = archive.top("data.pkl")
    loaded = pickled.load(io.BytesIO(archive.content(f"{top}/data.pkl", pickled.MOST_PICKLED)))
    data = f"{top}/data/"
    records = {name.removeprefix(data): archive.record(name) for name in archive.entries if name.startswith(data)}
    return TorchFile(path, size, loaded, records, swapped=archive.swapped(top))


_SCALARS = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Dtypes by the numbers that `torch.export` has for them."""


def read_program(path: Path, size: int) -> TorchFile:
    """The weights of a program of `torch.export`, in an archive of torch 2.8 or later. Raises as `read_archive`."""
    archive = _Archive(path, size)
    config = "data/weights/model_weights_config.json"
    if not any(name.endswith(f"/{config}") for name in archive.entries):
        raise DamagedError(
            "is a program of torch.export from before torch 2.8. Load it with torch.export.load and save it again, or "
            "save its state_dict"
        )
    top = archive.top(config)
    said = json.loads(archive.content(f"{top}/{config}", pickled.MOST_PICKLED))["config"]
    loaded: dict[str, Pending] = {}
    records: dict[str, tuple[int, int]] = {}
    for name, one in said.items():
        meta, key = one["tensor_meta"], str(one["path_name"])
        dtype = _SCALARS.get(meta["dtype"])
        if one.get("use_pickle") or dtype is None:
            loaded[name] = Pending(None, 0, (), (), None, "a tensor of a kind that is not known")
            continue
        records[key] = archive.record(f"{top}/data/weights/{key}")
        sizes, strides = (tuple(n["as_int"] for n in meta[axis]) for axis in ("sizes", "strides"))
        storage = Storage(key, dtype, records[key][1] // dtype.itemsize)
        loaded[name] = Pending(storage, meta["storage_offset"]["as_int"], sizes, strides, dtype)
    return TorchFile(path, size, loaded, records, swapped=archive.swapped(top))


def read_legacy(path: Path, size: int) -> TorchFile:
    """A file of torch before 1.6: pickles, then the numbers of each storage. Raises as `read_archive`."""
    with path.open("rb") as file:
        at = 0
        dtypes: dict[str, torch.dtype] = {}

        def following() -> Any:
            nonlocal at
            file.seek(at)
            stream = io.BytesIO(file.read(pickled.MOST_PICKLED))
            made = pickled.load(stream, dtypes)
            at += stream.tell()
            return made

        if following() != _MAGIC:
            raise DamagedError(
                "is a Python pickle that torch.save has not written; reading such could run code. Where you trust "
                'it, load it in a script of your own and keep its arrays with numpy.savez("model.npz", **arrays), '
                "which is read as it is"
            )
        if following() != _VERSION:
            raise DamagedError("is of a version of torch.save that is not known")
        system = following()
        order = "little" if not isinstance(system, dict) or system.get("little_endian", True) else "big"
        loaded = following()
        keys = following()
        records: dict[str, tuple[int, int]] = {}
        for key in map(str, keys):
            file.seek(at)
            (count,) = struct.unpack("<q" if order == "little" else ">q", file.read(8))
            length = count * dtypes[key].itemsize
            if not 0 <= length <= size - at - 8:
                raise DamagedError("is cut short: the numbers of its tensors are not all there")
            records[key] = at + 8, length
            at += 8 + length
    return TorchFile(path, size, loaded, records, swapped=order != sys.byteorder)

"""Arrays of NumPy as checkpoints: `.npz` archives and folders of `.npy` files; nothing of them is unpickled."""

from __future__ import annotations

import ast
import hashlib
import io
import zipfile
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from htcompress.errors import CheckpointError
from htcompress.sources.checkpoint import Checkpoint, checked_name, first_line, wrappers

END = ".npy"

_MOST_FILES = 100_000
_EXPANDS, _LEAST = 64, 1 << 24
"""How many times the bytes of an archive its arrays may be, and what they may be in any case."""
_MOST_DIMENSIONS = 32
_HEADERS = {(1, 0): 2, (2, 0): 4}
"""Bytes that tell the length of a header, by the version of the format; version 3 is for names of fields alone."""
_MOST_HEADER = 10_000


def read_npz(path: Path, digest: str, size: int, weights: str | None) -> Checkpoint:
    """The arrays of an `.npz` archive by their names, a slash in them read as a dot."""
    _one_alone(path, weights)
    found: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            whole = sum(entry.file_size for entry in entries)
            if whole > max(_EXPANDS * size, _LEAST):
                raise CheckpointError(
                    f"{path} unpacks to {whole} bytes, of {size}: more than trained weights are ever packed by. Save "
                    f"it with numpy.savez, which does not pack."
                )
            for entry in entries:
                with archive.open(entry) as file:
                    _add(found, entry.filename, _array(file, entry.file_size, entry.filename, path), path)
    except CheckpointError:
        raise
    except Exception as error:  # words of zipfile and what unpacks for damage
        raise CheckpointError(
            f"{path} is not a readable .npz archive ({first_line(error)}). It may be cut short; save it again with "
            f"numpy.savez."
        ) from error
    return _checkpoint(path, digest, size, found)


def holds_arrays(folder: Path) -> bool:
    """Whether a folder has `.npy` files in it."""
    return any(True for _ in _files(folder))


def read_folder(folder: Path, weights: str | None) -> Checkpoint:
    """The arrays of the `.npy` files in a folder, by the names of the files.

    Raises `CheckpointError` where one is damaged or holds Python objects.
    """
    _one_alone(folder, weights)
    found: dict[str, Tensor] = {}
    digest, size = hashlib.sha256(), 0
    for count, place in enumerate(sorted(_files(folder))):
        if count >= _MOST_FILES:
            raise CheckpointError(f"{folder} has more than {_MOST_FILES} .npy files; expected those of one model.")
        try:
            with place.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
                length = file.seek(0, io.SEEK_END)
                file.seek(0)
                _add(found, place.name, _array(file, length, place.name, folder), folder)
        except OSError as error:
            raise CheckpointError(f"{place} cannot be read: {error.strerror}.") from error
        digest.update(f"{place.name} {own}\n".encode())
        size += length
    return _checkpoint(folder, digest.hexdigest(), size, found)


def _files(folder: Path) -> Iterable[Path]:
    return (place for place in folder.glob(f"*{END}") if place.is_file())


def _one_alone(path: Path, weights: str | None) -> None:
    if weights:
        raise CheckpointError(
            f"{path} holds arrays of NumPy, one state_dict; found weights {weights!r} asked for. Leave it out."
        )


def _checkpoint(path: Path, digest: str, size: int, found: dict[str, Tensor]) -> Checkpoint:
    if not found:
        raise CheckpointError(f"{path} holds no arrays of numbers; expected a model's weights by their names.")
    prefix = wrappers(found)
    return Checkpoint(path, digest, {name.removeprefix(prefix): tensor for name, tensor in found.items()}, size)


def _add(found: dict[str, Tensor], file: str, array: Tensor | None, path: Path) -> None:
    name = checked_name(file.removesuffix(END).replace("/", "."), path)
    if name in found:
        raise CheckpointError(f"{path} has two arrays called {name}; expected one of each name. Save it again.")
    if array is not None:
        found[name] = array


def _array(file: IO[bytes], length: int, name: str, path: Path) -> Tensor | None:
    """The array that an `.npy` file of so many bytes holds; None of text and times.

    No more is read and made than the file has.
    """
    try:
        dtype, shape, fortran, begins = _header(file)
        if dtype.hasobject:
            raise CheckpointError(
                f"{path}: {name} holds Python objects, which are pickled and could run code; they are not read. Save "
                f"plain arrays of numbers."
            )
        if dtype.kind in "SUmM":
            return None
        if dtype.kind not in "fiubc":
            raise ValueError(f"it is of the type {dtype}; save it as float32")
        count = prod(shape) * dtype.itemsize
        if count != length - begins:
            raise ValueError(f"its shape {shape} needs {count} bytes, and there are {max(length - begins, 0)}")
        content = bytearray(file.read(count))
        if len(content) < count:
            raise ValueError(f"its shape {shape} needs {count} bytes, and there are {len(content)}")
        array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
        native = dtype.newbyteorder("=")
        return torch.from_numpy(np.ascontiguousarray(array, native).reshape(shape))
    except (ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError, KeyError) as error:
        raise CheckpointError(f"{path}: {name} is no array that can be read ({first_line(error)}).") from error


def _header(file: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Type, shape, whether columns come first, and where the numbers begin (numpy.lib.format)."""
    start = file.read(8)
    width = _HEADERS.get((start[6], start[7])) if len(start) == 8 and start[:6] == b"\x93NUMPY" else None
    if width is None:
        raise ValueError("it is no .npy file of plain arrays")
    most = int.from_bytes(file.read(width), "little")
    if most > _MOST_HEADER:
        raise ValueError(f"its header has {most} bytes")
    said = ast.literal_eval(file.read(most).decode("latin1").strip())
    if not isinstance(said, dict) or said.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header is none")
    shape = said["shape"]
    whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or len(shape) > _MOST_DIMENSIONS or not isinstance(said["fortran_order"], bool):
        raise ValueError("it has a shape that no array has")
    descr = said["descr"]
    dtype = np.dtype(descr) if isinstance(descr, str) else np.dtype(np.void)
    return dtype, shape, said["fortran_order"], 8 + width + most

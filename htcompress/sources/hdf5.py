"""HDF5 files: their arrays by path, and nothing that leads out of them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from htcompress.errors import CheckpointError, RequestError
from htcompress.sources.checkpoint import first_line

_MOST_OBJECTS, _DEEPEST = 100_000, 32
_EXPANDS = 1100
"""How many times larger than its bytes an array may be: what deflate can do at most, and a little."""


@contextmanager
def opened(content: bytes | io.BytesIO | Path, path: Path, mode: str = "r") -> Iterator[Any]:
    """An HDF5 file, or its bytes, as h5py's file.

    Raises:
        CheckpointError: it is damaged.
        RequestError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise RequestError(
            f"{path} is an HDF5 file, which needs the package h5py: pip install 'htcompress[keras]'."
        ) from error
    try:
        with h5py.File(io.BytesIO(content) if isinstance(content, bytes) else content, mode) as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py's words for damage
        raise CheckpointError(
            f"{path} is not a readable HDF5 file ({first_line(error)}). It may be cut short; save or download it again."
        ) from error


def datasets(file: Any, size: int, path: Path) -> dict[str, Any]:
    """All arrays of numbers in a file by their paths, without the first slash.

    Args:
        file: of h5py.
        size: of the file, in bytes.

    Raises `CheckpointError` where something leads to other files, or an array is larger than the file can hold.
    """
    import h5py

    found: dict[str, Any] = {}
    level: list[tuple[str, Any]] = [("", file)]
    seen = 0
    for _ in range(_DEEPEST):
        below: list[tuple[str, Any]] = []
        for prefix, group in level:
            for name in group:
                seen += 1
                if seen > _MOST_OBJECTS:
                    raise CheckpointError(f"{path} holds more than {_MOST_OBJECTS} groups and arrays; it is damaged.")
                where = f"{prefix}/{name}" if prefix else name
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise CheckpointError(
                        f"{path}: {where} is a link, perhaps to another file, which is not followed. Save the model "
                        f"again with Keras."
                    )
                child = group[name]
                if isinstance(child, h5py.Group):
                    below.append((where, child))
                elif isinstance(child, h5py.Dataset) and child.dtype.kind in "fiub":
                    found[where] = _checked(child, where, size, path)
        level = below
    if level:
        raise CheckpointError(f"{path} has groups in groups more than {_DEEPEST} deep; it is damaged.")
    return found


def _checked(dataset: Any, where: str, size: int, path: Path) -> Any:
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(
            f"{path}: the numbers of {where} stand in another file, which is not read. Save the model again with Keras."
        )
    most = size * (_EXPANDS if dataset.chunks else 1)
    if dataset.nbytes > most:
        raise CheckpointError(f"{path}: {where} has shape {dataset.shape}, more than the file can hold; it is damaged.")
    return dataset


def words(attributes: Mapping[str, Any], name: str) -> list[str] | None:
    """A list of names among attributes; Keras parts a long one (`layer_names0`, ...). None where there is none."""
    parts = [attributes[name]] if name in attributes else []
    while not parts or name not in attributes:
        part = f"{name}{len(parts)}"
        if part not in attributes:
            break
        parts.append(attributes[part])
    if not parts:
        return None
    return [text(word) for part in parts for word in np.asarray(part).ravel().tolist()]


def text(value: Any) -> str:
    """An attribute of text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

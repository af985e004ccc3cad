"""What a file is, by its first bytes and, for archives, by the names in it; its own name tells nothing."""

from __future__ import annotations

import gzip
import re
import tarfile
import zipfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Container(StrEnum):
    """The files that can be read."""

    ARCHIVE = "a zip archive of torch"
    TORCHSCRIPT = "a TorchScript archive"
    PROGRAM = "a program of torch.export"
    LEGACY = "a torch file from before 1.6"
    SAFETENSORS = "a safetensors file"
    ONNX = "an ONNX file"
    KERAS = "a Keras file"
    HDF5 = "an HDF5 file"
    NUMPY = "an .npz archive"


@dataclass(frozen=True)
class Foreign:
    """A file that is not read: what it is, and what to do with it."""

    what: str
    step: str = 'Save one with torch.save(model.state_dict(), "model.pt").'


_UNPACK = "Unpack it, and give the file of weights that is in it."
_SHOWN, _LOOKED_AT = 5, 1 << 26
"""Names of an archive that are told, and the unpacked bytes that they are looked for in."""

_MOST_HEADER = 100_000_000
"""The bytes that safetensors allows a header."""

_STARTS: tuple[tuple[bytes, Foreign], ...] = (
    (b"BZh", Foreign("a bzip2 archive", _UNPACK)),
    (b"\xfd7zXZ\x00", Foreign("an xz archive", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Foreign("a Zstandard archive", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", _UNPACK)),
    (
        b"\x93NUMPY",
        Foreign("an array of NumPy (.npy), alone", "Give the folder that the arrays of the model are in, or an .npz."),
    ),
    (b"GGUF", Foreign("a GGUF file")),
    (
        b"version https://git-lfs",
        Foreign("a pointer of Git LFS in place of the file itself", "Fetch the file with git lfs pull."),
    ),
)
_ONNX = re.compile(rb"\x08[\x01-\x20](\x12.|\x1a.|\x3a|\x42)", re.DOTALL)
_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)


def recognise(path: Path, size: int) -> Container | Foreign | None:
    """What can be read, or what else it is; None where the content tells nothing.

    Args:
        path: an existing file.
        size: of the file, in bytes.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= _MOST_HEADER:
        return Container.SAFETENSORS
    # Pickles begin with their protocol.
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return Container.LEGACY
    if head[257:262] == b"ustar":
        return Foreign(f"a tar archive{_held(path)}", _UNPACK)
    if head.startswith(b"\x1f\x8b"):
        return Foreign(f"a gzip archive{_held(path)}", _UNPACK)
    if head[4:8] == b"TFL3":
        step = "Make ONNX of it with python -m tf2onnx.convert --tflite FILE --output model.onnx, and give that."
        return Foreign("a TensorFlow Lite file", step)
    if _ONNX.match(head) and size > 64:
        return Container.ONNX
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return Container.HDF5
    if _PAGE.match(head):
        return Foreign("a web page, perhaps of a download that failed", "Download the file again.")
    return next((what for start, what in _STARTS if head.startswith(start)), None)


def _held(path: Path) -> str:
    """The first names in a tar archive, packed or not, as words; nothing where it is none."""
    names: list[str] = []
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = _Limited(gzip.GzipFile(fileobj=file) if packed else file)
            with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    if member.isfile():
                        names.append(member.name)
                    if len(names) == _SHOWN:
                        break
    except Exception:  # damaged, or of something else: the names so far are what is known
        pass
    shown = [name[:80] for name in names if name.isprintable()]
    return f" with {', '.join(shown)}" if shown else ""


class _Limited:
    """The first bytes of a stream."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, _LOOKED_AT

    def read(self, size: int) -> bytes:
        found: bytes = self._stream.read(min(size, self._left))
        self._left -= len(found)
        return found


def _archive(path: Path) -> Container | Foreign | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    ends = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in ends:
        return Container.TORCHSCRIPT
    if "data.pkl" in ends:
        return Container.ARCHIVE
    if "models/model.json" in ends or any(name.startswith("serialized_exported_program") for name in ends):
        return Container.PROGRAM
    if "model.weights.h5" in names:
        return Container.KERAS
    if "metadata.json" in names and "config.json" in names:
        step = 'Save it with model.save("model.keras") where h5py is installed.'
        return Foreign("a Keras file without model.weights.h5 in it", step)
    if any(name.startswith(".data/") for name in ends):
        return Foreign("a package of torch.package")
    if names and all(name.endswith(".npy") for name in names):
        return Container.NUMPY
    held = ", ".join(name[:80] for name in names if name.isprintable() and not name.endswith("/"))[:200]
    return Foreign(f"a zip archive without a torch checkpoint in it (no data.pkl), with {held or 'nothing'}", _UNPACK)

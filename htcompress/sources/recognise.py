"""What a file is, by its first bytes and, for archives, by the names in it; its own name tells nothing."""

from __future__ import annotations

import re
import zipfile
from enum import StrEnum
from pathlib import Path


class Container(StrEnum):
    """The files that can be read."""

    ARCHIVE = "a zip archive of torch"
    LEGACY = "a torch file from before 1.6"
    SAFETENSORS = "a safetensors file"
    ONNX = "an ONNX file"


_MOST_HEADER = 100_000_000
"""The bytes that safetensors allows a header."""

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras before 3, or others)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x93NUMPY", "an array of NumPy (.npy)"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file itself; fetch it with git lfs pull"),
)
_ONNX = re.compile(rb"\x08[\x01-\x20](\x12.|\x1a.|\x3a|\x42)", re.DOTALL)
_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)


def recognise(path: Path, size: int) -> Container | str | None:
    """What can be read, or the words for what cannot; None where the content tells nothing.

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
        return "a tar archive (torch before 0.1.10 wrote such files, too)"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite file"
    if _ONNX.match(head) and size > 64:
        return Container.ONNX
    if _PAGE.match(head):
        return "a web page, perhaps of a download that failed"
    return next((words for start, words in _STARTS if head.startswith(start)), None)


def _archive(path: Path) -> Container | str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    ends = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in ends:
        return "a TorchScript archive"
    if "data.pkl" in ends:
        return Container.ARCHIVE
    if "models/model.json" in ends or any(name.startswith("serialized_exported_program") for name in ends):
        return "a program of torch.export"
    if "model.weights.h5" in names or ("metadata.json" in names and "config.json" in names):
        return "a Keras file"
    if any(name.startswith(".data/") for name in ends):
        return "a package of torch.package"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    return "a zip archive without a torch checkpoint in it (no data.pkl)"

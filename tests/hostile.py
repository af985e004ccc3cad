"""Hostile checkpoints by hand, and bounds on the time and memory that reading them may take."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from htcompress.errors import CheckpointError
from htcompress.sources.read import read_checkpoint

MEMORY = 256_000_000  # bytes more than before; the files here have some hundred kilobytes at most
SECONDS = 20.0


def resident() -> int:
    """The largest resident size of this process since it was last asked, bytes."""
    with open("/proc/self/status") as file:
        found = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return found


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where what is done within takes more than `SECONDS` of this process, or `MEMORY` more than before."""
    try:
        resident()
    except OSError:
        yield
        return
    before, began = resident(), time.process_time()
    yield
    assert time.process_time() - began < SECONDS
    assert resident() - before < MEMORY


def refused(path: Path) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1500
    return message


def archive(path: Path, pickle_: bytes, data: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive as torch.save makes it, with any pickle and any storages."""
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr("m/data.pkl", pickle_)
        made.writestr("m/version", "3")
        for name, content in (data or {}).items():
            made.writestr(f"m/data/{name}", content)
    return path


class Claim:
    """Pickles as a tensor that claims a storage, an offset, a shape and strides."""

    def __init__(self, claimed: Any, offset: Any, size: Any, stride: Any) -> None:
        self.parts = claimed, offset, size, stride


class Pickler(pickle._Pickler):
    """Writes `Claim`s as torch writes tensors."""

    def persistent_id(self, value: Any) -> Any:
        return value[1] if isinstance(value, tuple) and value and value[0] == "a storage" else None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Claim):
            claimed, offset, size, stride = value.parts
            where = "a storage", ("storage", torch.FloatStorage, "0", "cpu", claimed)
            rebuild = torch._utils._rebuild_tensor_v2
            self.save_reduce(rebuild, (where, offset, size, stride, False, {}))
        else:
            super().save(value, save_persistent_id)


def written(value: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()

"""Checkpoints of fine-tuning: the state of a run in one file, from which a run that was killed goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htcompress.errors import CheckpointError, RequestError
from htcompress.isolation import RandomState

_FILE, _FACTS, _SCHEMA = "checkpoint.safetensors", "facts", "htcompress.checkpoint/1"


@dataclass(frozen=True, eq=False)
class Saved:
    """The state of a run: tensors by name, and everything else as JSON values."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by what follows."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def to_bytes(self) -> bytes:
        """As a safetensors file; the facts are a tensor of their bytes."""
        from safetensors.torch import save

        facts = json.dumps({"schema": _SCHEMA, **self.facts}).encode()
        # safetensors refuses views and shared memory.
        plain = {name: t.detach().cpu().clone().contiguous() for name, t in self.tensors.items()}
        return save({**plain, _FACTS: torch.frombuffer(bytearray(facts), dtype=torch.uint8)})

    @classmethod
    def of_bytes(cls, content: bytes, source: Path) -> Saved:
        """The inverse. Raises `CheckpointError` where it is none; `source` is the file that is named."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(content)
            facts = json.loads(bytes(tensors.pop(_FACTS).numpy()))
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{source} is no checkpoint of fine-tuning ({error}). Remove it to begin anew."
            ) from error
        if not isinstance(facts, dict) or facts.get("schema") != _SCHEMA:
            raise CheckpointError(f"{source} was written by another version of htcompress. Remove it to begin anew.")
        return cls(facts, tensors)


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps its state, and how often.

    Args:
        folder: for the one file; it is made when it is needed, and may be on a file system that only the first of
            several processes sees.
        every: steps from one checkpoint to the next; None: none are kept, or after `resume` as often as before.
        resume: whether to go on from what is there.

    Raises:
        RequestError: `every` is no number of steps.
    """

    folder: Path
    every: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and (isinstance(self.every, bool) or self.every < 1):
            raise RequestError(f"Checkpoints are kept every so many steps, at least 1; found {self.every!r}.")

    @property
    def file(self) -> Path:
        """The checkpoint."""
        return self.folder / _FILE

    def last(self) -> bytes | None:
        """The last checkpoint, if the run is to go on from one and there is one.

        Raises:
            RequestError: there is one, and the run is not to go on from it.
            CheckpointError: it cannot be read.
        """
        try:
            content = self.file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CheckpointError(f"The checkpoint {self.file} cannot be read: {error.strerror}.") from error
        if not self.resume:
            raise RequestError(
                f"{self.file} is the checkpoint of a run that has not ended. Go on with --resume, or remove it to "
                f"begin anew."
            )
        return content

    def keep(self, content: bytes) -> None:
        """Put a checkpoint in the place of the last one, in one step. Raises `RequestError` where it cannot be."""
        partial = self.folder / f".{_FILE}.{os.getpid()}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self.file)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise RequestError(
                f"The checkpoint {self.file} cannot be written: {error.strerror or error}. Make room, or give another "
                f"folder with --checkpoint."
            ) from error

    def remove(self) -> None:
        """Remove the checkpoint of a run that has ended, what killed runs left beside it, and an empty folder."""
        if not self.folder.is_dir():
            return
        for left in [self.file, *self.folder.glob(f".{_FILE}.*.partial")]:
            left.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            shutil.rmtree(self.folder, ignore_errors=True)


def random_facts(state: RandomState) -> dict[str, Any]:
    """Where random generators stand as JSON values; 20 kB, one more for every GPU."""
    kind, keys, *others = state.numpy
    return {
        "torch": [bytes(t.numpy()).hex() for t in state.torch],
        "numpy": [kind, keys.tolist(), *others],
        "python": [state.python[0], list(state.python[1]), state.python[2]],
    }


def random_state(facts: Mapping[str, Any]) -> RandomState:
    """The inverse of `random_facts`."""
    version, numbers, gauss = facts["python"]
    return RandomState(
        [torch.frombuffer(bytearray(bytes.fromhex(word)), dtype=torch.uint8) for word in facts["torch"]],
        tuple(facts["numpy"]),  # NumPy takes a list for its array
        (version, tuple(numbers), gauss),
    )

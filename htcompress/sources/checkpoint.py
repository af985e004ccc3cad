"""What a file of weights gives, and what its readers share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from htcompress.errors import CheckpointError

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""

MAKE_ONE = 'Save one with torch.save(model.state_dict(), "model.pt").'
_LONGEST_NAME = 1024


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model by name, and the file they came from.

    Attributes:
        path: the file.
        sha256: of its bytes, in hexadecimal.
        tensors: by the names of the model, without wrappers' prefixes; dense (or quantised) ones of the CPU.
        size: of the file, in bytes.
        key: where in the file the state_dict stands, dotted (`model.state_dict`); empty at the top.
        others: the keys of state_dicts in the file that could have been taken instead (`state_dict_ema`).
        metadata: the versions of modules that torch keeps in `state_dict()._metadata`; None where the file has none,
            or where names were changed.
        extra: what modules gave by `get_extra_state`, by names that end in `_extra_state`; tensors are in `tensors`.
        left: recurrent layers that torch's modules cannot stand in for, and why; their weights bear their own names.
        note: what is to be known of the file, in a sentence; empty where nothing is.
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    size: int
    key: str = ""
    others: tuple[str, ...] = ()
    metadata: Mapping[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def unreadable(path: Path, reason: str) -> CheckpointError:
    told = f" ({reason})" if reason else ""
    return CheckpointError(
        f"{path} is not a readable torch checkpoint{told}. It may be cut short or of another format; expected a "
        f"state_dict. {MAKE_ONE}"
    )


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split("\n", 1)[0].split())
    # Torch appends advice of its own after the first sentence.
    sentence = re.split(r"(?<=[a-z)])\. ", text)[0].rstrip(".")
    return sentence[:160] or type(error).__name__


def checked_name(name: str, path: Path) -> str:
    """The name, where it can be shown and written."""
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise CheckpointError(
            f"{path} has an entry called {name[:60]!a}; expected names of at most {_LONGEST_NAME} printable "
            f"characters. {MAKE_ONE}"
        )
    return name


def wrappers(entries: Mapping[str, Any]) -> str:
    """What wrappers have put before every name."""
    found = ""
    while prefix := next((p for p in PREFIXES if entries and all(n.startswith(found + p) for n in entries)), None):
        found += prefix
    return found

"""Reading a checkpoint: any common container of a state_dict, never code."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htcompress.errors import CheckpointError

NESTED_KEYS = ("state_dict", "model_state_dict", "model_state", "model")
"""Where training scripts put the state_dict beside an optimizer's and an epoch's."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""

_MAKE_ONE = 'Save one with torch.save(model.state_dict(), "model.pt").'


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model by name, and the file they came from.

    Attributes:
        path: the file.
        sha256: of its bytes, in hexadecimal.
        tensors: by the names of the model, without wrappers' prefixes.
        size: of the file, in bytes.
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    size: int


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a state_dict from `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors`.

    Loading never runs code (`weights_only=True`); the state_dict may stand under `state_dict`, `model`,
    `model_state` or `model_state_dict`, and its names may begin with `module.` or `_orig_mod.`.

    Raises:
        CheckpointError: the file is missing, empty, broken, holds pickled objects or no state_dict.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no file {path}. Give the path of a trained checkpoint (.pt, .safetensors).")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; expected a checkpoint file (.pt, .pth, .ckpt, .safetensors).")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): the checkpoint was not written. Save it again.")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return Checkpoint(path, digest, _state_dict(loaded, path), size)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({_first_line(error)}). It may be cut short or of another "
            f"format; save or download it again."
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # Files of torch before 1.6 are not zip archives and cannot be mapped.
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: Exception) -> CheckpointError:
    # Torch wraps the unpickler's own words in advice on loading without safety.
    root = error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error
    text = str(root)
    if "TorchScript" in text:
        return CheckpointError(f"{path} is a TorchScript archive; expected a state_dict. {_MAKE_ONE}")
    if found := re.search(r"GLOBAL ([A-Za-z_]\w*(?:\.\w+)+) ", text):
        return CheckpointError(
            f"{path} holds pickled Python objects ({found[1]}), perhaps a whole module; loading those could run code, "
            f"so htcompress takes a plain state_dict only. Where you trust the file, load it in a script of your own "
            f'and save torch.save(model.state_dict(), "model.pt").'
        )
    # Only torch's own words say anything: an unpickler that stumbles over noise raises whatever it likes.
    reason = f" ({_first_line(root)})" if type(root) is RuntimeError else ""
    return CheckpointError(
        f"{path} is not a readable torch checkpoint{reason}. It may be cut short or of another format; expected a "
        f"state_dict. {_MAKE_ONE}"
    )


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split("\n", 1)[0].split())
    # Torch appends advice of its own after the first sentence.
    sentence = re.split(r"(?<=[a-z)])\. ", text)[0].rstrip(".")
    return sentence[:160] or type(error).__name__


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    found = _find(loaded)
    if found is None:
        what = type(loaded).__name__
        if isinstance(loaded, Mapping):
            what = f"a dict with keys {', '.join(map(str, list(loaded)[:6]))}" if loaded else "an empty dict"
        raise CheckpointError(
            f"{path} holds {what}; expected a state_dict (names to tensors), at the top or under one of "
            f"{', '.join(NESTED_KEYS)}. {_MAKE_ONE}"
        )
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    while True:
        prefix = next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}


def _find(loaded: Any) -> Mapping[Any, Any] | None:
    if not isinstance(loaded, Mapping):
        return None
    for key in NESTED_KEYS:
        if key in loaded and (inner := _find(loaded[key])) is not None:
            return inner
    return loaded if any(isinstance(value, Tensor) for value in loaded.values()) else None

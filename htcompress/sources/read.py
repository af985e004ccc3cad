"""Reading a checkpoint: any common container of a state_dict, never code."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from htcompress.errors import CheckpointError
from htcompress.sources import nesting
from htcompress.sources.pickled import ForeignObjectError, Opaque, Pending, PlainDict
from htcompress.sources.recognise import Container, recognise
from htcompress.sources.torch_file import DamagedError, TorchFile, read_archive, read_legacy

NESTED_KEYS = nesting.KNOWN
"""Where training scripts put the state_dict beside an optimizer's and an epoch's."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""

_MAKE_ONE = 'Save one with torch.save(model.state_dict(), "model.pt").'
_LONGEST_NAME = 1024
_MOST_EXTRA = 100_000
_DEEPEST_EXTRA = 32


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
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    size: int
    key: str = ""
    others: tuple[str, ...] = ()
    metadata: Mapping[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path, *, weights: str | None = None) -> Checkpoint:
    """Read a state_dict from a file of `torch.save` or of safetensors, whatever the file is called.

    Nothing of the file is run. The state_dict may stand under `state_dict`, `model`, `model_state` or
    `model_state_dict`, or be the only one, or several that then belong together (`{"encoder": ..., "decoder": ...}`
    gives `encoder.rnn.weight_ih_l0`). Its names may begin with `module.` or `_orig_mod.`.

    Args:
        path: the file.
        weights: the dotted key of the state_dict to take, such as `state_dict_ema`; by default the usual one.

    Raises:
        CheckpointError: the file is missing, empty, broken, holds pickled objects, no state_dict, or none at `weights`.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no file {path}. Give the path of a trained checkpoint (.pt, .safetensors).")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; expected a checkpoint file (.pt, .pth, .ckpt, .safetensors).")
    if not path.is_file():
        raise CheckpointError(f"{path} is a device or a pipe; expected a checkpoint file (.pt, .safetensors).")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): the checkpoint was not written. Save it again.")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        what = recognise(path, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if isinstance(what, Container):
        read = _read_safetensors if what is Container.SAFETENSORS else _read_torch
        return read(path, digest, size, what, weights)
    if what is not None:
        raise CheckpointError(f"{path} is {what}; expected a state_dict. {_MAKE_ONE}")
    if path.suffix == ".safetensors":
        raise _unreadable_safetensors(path, "its header is not one")
    raise _unreadable(path, "")


def _read_safetensors(path: Path, digest: str, size: int, _: Container, weights: str | None) -> Checkpoint:
    from safetensors import safe_open
    from safetensors.torch import load_file

    if weights:
        raise CheckpointError(
            f"{path} is a safetensors file, which holds one state_dict; found weights {weights!r} asked for. Leave it "
            f"out."
        )
    try:
        tensors = dict(load_file(path))
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
    except Exception as error:  # other libraries' words for damage
        raise _unreadable_safetensors(path, _first_line(error)) from error
    # safetensors.torch.save_model keeps the further names of a tensor there, beside the format (pt).
    tied = {name: of for name, of in said.items() if name not in tensors and of in tensors and name != "format"}
    tensors |= {name: tensors[of] for name, of in tied.items()}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; expected a state_dict (names to tensors). {_MAKE_ONE}")
    tensors = {_name(name, path): tensor for name, tensor in tensors.items()}
    prefix = _wrappers(tensors)
    return Checkpoint(path, digest, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, size)


def _read_torch(path: Path, digest: str, size: int, what: Container, weights: str | None) -> Checkpoint:
    try:
        file = (read_archive if what is Container.ARCHIVE else read_legacy)(path, size)
    except ForeignObjectError as error:
        # A damaged file asks for anything; only a real name says something.
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", str(error), re.ASCII):
            raise CheckpointError(
                f"{path} holds pickled Python objects ({str(error)[:200]}), perhaps a whole module; loading those "
                f"could run code, so htcompress takes a plain state_dict only. Where you trust the file, load it in a "
                f'script of your own and save torch.save(model.state_dict(), "model.pt").'
            ) from error
        raise _unreadable(path, "") from error
    except DamagedError as error:
        raise _unreadable(path, str(error)) from error
    except Exception as error:  # an unpickler that stumbles over noise raises whatever it likes
        raise _unreadable(path, "") from error
    try:
        found = _chosen(file, path, weights)
        entries = {_name(name, path): value for name, value in found.entries.items()}
    except nesting.TooDeepError as error:
        raise CheckpointError(f"{path} {error}; expected a state_dict. {_MAKE_ONE}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "") from error
    prefix = _wrappers(entries)
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for full, value in entries.items():
        name = full.removeprefix(prefix)
        try:
            if isinstance(value, Pending):
                tensors[name] = file.tensor(value)
            else:
                extra[name] = _Plain(file).of(value)
        except DamagedError as error:
            raise CheckpointError(f"{path}: {full} {error}.") from error
        except (RuntimeError, TypeError, ValueError, OverflowError, IndexError) as error:  # torch's words for damage
            raise CheckpointError(f"{path}: {full} cannot be read ({_first_line(error)}); it is damaged.") from error
    metadata = None if prefix else _metadata(found.source)
    return Checkpoint(path, digest, tensors, size, found.key, found.others, metadata, extra)


def _unreadable_safetensors(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a readable safetensors file ({reason}). It may be cut short or of another format; save or "
        f"download it again."
    )


def _unreadable(path: Path, reason: str) -> CheckpointError:
    told = f" ({reason})" if reason else ""
    return CheckpointError(
        f"{path} is not a readable torch checkpoint{told}. It may be cut short or of another format; expected a "
        f"state_dict. {_MAKE_ONE}"
    )


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split("\n", 1)[0].split())
    # Torch appends advice of its own after the first sentence.
    sentence = re.split(r"(?<=[a-z)])\. ", text)[0].rstrip(".")
    return sentence[:160] or type(error).__name__


def _is_pending(value: Any) -> bool:
    return isinstance(value, Pending)


def _chosen(file: TorchFile, path: Path, weights: str | None) -> nesting.Found:
    loaded = file.loaded
    if weights:
        found = nesting.take(loaded, weights, _is_pending)
        if found is None:
            known = [key for key, _ in nesting.listed(loaded, _is_pending)]
            shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise CheckpointError(
                f"{path} has no weights at {weights!r}; "
                + (f"there are {shown}. Give one of those." if known else "its state_dict is not nested. Leave it out.")
            )
        return found
    found = nesting.find(loaded, _is_pending)
    if found is None:
        what = type(loaded).__name__
        if isinstance(loaded, dict):
            keys = ", ".join(key if isinstance(key, str) and key.isprintable() else f"{key!a}" for key in [*loaded][:6])
            keys = keys[:200]
            what = f"a dict with keys {keys}" if loaded else "an empty dict"
        raise CheckpointError(
            f"{path} holds {what}; expected a state_dict (names to tensors), at the top or under one of "
            f"{', '.join(NESTED_KEYS)}. {_MAKE_ONE}"
        )
    return found


def _name(name: str, path: Path) -> str:
    """The name, where it can be shown and written."""
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise CheckpointError(
            f"{path} has an entry called {name[:60]!a}; expected names of at most {_LONGEST_NAME} printable "
            f"characters. {_MAKE_ONE}"
        )
    return name


def _wrappers(entries: Mapping[str, Any]) -> str:
    """What wrappers have put before every name."""
    found = ""
    while prefix := next((p for p in PREFIXES if entries and all(n.startswith(found + p) for n in entries)), None):
        found += prefix
    return found


@dataclass
class _Plain:
    """Extra state as plain values: numbers, text, lists, dicts, tensors."""

    file: TorchFile
    seen: int = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        """The value. Raises `DamagedError` where it is no plain one."""
        self.seen += 1
        if self.seen > _MOST_EXTRA or depth > _DEEPEST_EXTRA:
            raise DamagedError(
                f"has more than {_MOST_EXTRA} values, or nests deeper than {_DEEPEST_EXTRA}; expected the small state "
                f"that get_extra_state() gives"
            )
        if isinstance(value, Pending):
            return self.file.tensor(value)
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, PlainDict) else dict
            return kind((key, self.of(inner, depth + 1)) for key, inner in dict.items(value))
        if isinstance(value, list | tuple | set):
            return type(value)(self.of(inner, depth + 1) for inner in value)
        what = "a Python object" if isinstance(value, Opaque) else f"a {type(value).__name__}"
        raise DamagedError(f"holds {what}; expected numbers, text, lists, dicts and tensors")


def _metadata(source: Mapping[Any, Any] | None) -> Mapping[str, Any] | None:
    """Torch's `_metadata` of a state_dict, where it is what torch makes of it."""
    given = source.metadata if isinstance(source, PlainDict) else None
    if not isinstance(given, dict) or len(given) > nesting.MOST_NAMES:
        return None
    plain = (bool, int, float, str, type(None))
    for name, own in dict.items(given):
        if not isinstance(name, str) or not isinstance(own, dict):
            return None
        if not all(isinstance(key, str) and isinstance(value, plain) for key, value in dict.items(own)):
            return None
    return OrderedDict((name, dict(dict.items(own))) for name, own in dict.items(given))

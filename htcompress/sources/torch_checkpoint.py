"""Checkpoints of `torch.save`, of both of its formats."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from htcompress.errors import CheckpointError
from htcompress.sources import nesting
from htcompress.sources.checkpoint import MAKE_ONE, Checkpoint, checked_name, first_line, unreadable, wrappers
from htcompress.sources.objects import Inert, Opaque, Pending, PlainDict
from htcompress.sources.pickled import ForeignObjectError
from htcompress.sources.torch_file import DamagedError, TorchFile

_MOST_EXTRA = 100_000
_DEEPEST_EXTRA = 32


def read_torch(
    read: Callable[[Path, int], TorchFile], path: Path, digest: str, size: int, weights: str | None
) -> Checkpoint:
    """A state_dict in a file of torch, which a reader of its container takes apart."""
    try:
        file = read(path, size)
    except ForeignObjectError as error:
        # A damaged file asks for anything; only a real name says something.
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", str(error), re.ASCII):
            raise CheckpointError(
                f"{path} holds pickled Python objects ({str(error)[:200]}), perhaps a whole module; loading those "
                f"could run code, so htcompress takes a plain state_dict only. Where you trust the file, load it in a "
                f'script of your own and save torch.save(model.state_dict(), "model.pt").'
            ) from error
        raise unreadable(path, "") from error
    except DamagedError as error:
        raise unreadable(path, str(error)) from error
    except Exception as error:  # an unpickler that stumbles over noise raises whatever it likes
        raise unreadable(path, "") from error
    try:
        found = _chosen(file, path, weights)
        entries = {checked_name(name, path): value for name, value in found.entries.items()}
    except nesting.TooDeepError as error:
        raise CheckpointError(f"{path} {error}; expected a state_dict. {MAKE_ONE}") from error
    except (ValueError, RecursionError) as error:
        raise unreadable(path, "") from error
    prefix = wrappers(entries)
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
            raise CheckpointError(f"{path}: {full} cannot be read ({first_line(error)}); it is damaged.") from error
    metadata = None if prefix else _metadata(found.source)
    return Checkpoint(path, digest, tensors, size, found.key, found.others, metadata, extra)


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
        if isinstance(loaded, Inert):
            what = f"an object of {loaded.name[:200]} without tensors of its own (those of quantised modules are none)"
        if isinstance(loaded, dict):
            keys = ", ".join(key if isinstance(key, str) and key.isprintable() else f"{key!a}" for key in [*loaded][:6])
            keys = keys[:200]
            what = f"a dict with keys {keys}" if loaded else "an empty dict"
        raise CheckpointError(
            f"{path} holds {what}; expected a state_dict (names to tensors), at the top or under one of "
            f"{', '.join(nesting.KNOWN)}. {MAKE_ONE}"
        )
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

"""The output directory, written whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htcompress.directory.cores import encoded
from htcompress.directory.extra import encoded_extra
from htcompress.directory.read import is_ours, read_tensors
from htcompress.errors import RequestError
from htcompress.files import is_left_over
from htcompress.report import Report, model_card, to_html, to_markdown


def check_writable(directory: Path) -> None:
    """Raise `RequestError` where an output directory could not be written, before any work is done."""
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"The output {directory} is a file; give a directory with -o.")
    if directory.is_dir() and any(directory.iterdir()) and not is_ours(directory):
        raise RequestError(
            f"The output directory {directory} exists and is not one of htcompress, so it is left as it is. Give "
            f"another with -o."
        )
    parent = _existing_parent(directory)
    if not parent.is_dir():
        raise RequestError(f"{parent} is a file, so the output {directory} cannot be in it; give a directory with -o.")
    if not os.access(parent, os.W_OK):
        raise RequestError(f"The folder {parent} cannot be written to; give another output directory with -o.")


def write_directory(
    directory: Path,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    report: Report,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write an output directory: beside its place first, then exchanged with what is there.

    An older one of ours is replaced; what its owner has put beside our files stays. What was written is read back
    before it counts.

    Args:
        tensors: the model's state by name; a tensor that stands under two names is stored once.
        config: the contents of `config.json`, see `config_of`.
        files: further ones, by name.

    Raises:
        RequestError: the place cannot be written, or holds something else.
        CheckpointError: a module's extra state is nothing that can be stored.
    """
    check_writable(directory)
    directory = directory.resolve()
    with _signals_deferred():
        _write(directory, tensors, config, report, files or {})


def _write(
    directory: Path,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    report: Report,
    files: Mapping[str, bytes],
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored, same, extra = _laid_out(encoded(config, tensors))
    config = {**config, "extra": extra} if extra else config
    made = _missing_parents(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    done = False
    try:
        _clear_remains(directory)
        partial.mkdir(parents=True)
        save_file(stored, partial / "model.safetensors", metadata={**same, "format": "pt"})
        (partial / "model.safetensors").chmod(0o666 & ~_umask())
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (partial / "report.json").write_text(report.to_json(), encoding="utf-8")
        (partial / "report.html").write_text(to_html(report), encoding="utf-8")
        (partial / "report.md").write_text(to_markdown(report), encoding="utf-8")
        for name, content in files.items():
            (partial / name).write_bytes(content)
        (partial / "README.md").write_text(model_card(report), encoding="utf-8")
        _read_back(partial, stored)
        if directory.exists():
            for other in directory.iterdir():
                if not (partial / other.name).exists():
                    _linked(other, partial / other.name)
            _exchange(partial, directory)
        else:
            partial.rename(directory)
        done = True
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            f"The output directory {directory} cannot be written: {reason}. Make room, or give another with -o."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not done:
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


def _laid_out(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """The tensors that are stored, each once; the further names of some, and which they are; extra state as JSON."""
    stored: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    extra: dict[str, Any] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            extra[name], inside = encoded_extra(name, value)
            stored |= inside
            continue
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device) if value.numel() else name
        if first.setdefault(key, name) != name:
            same[name] = first[key]
        else:
            # safetensors refuses views and shared memory.
            stored[name] = value.detach().cpu().clone().contiguous()
    return stored, same, extra


def _read_back(partial: Path, stored: Mapping[str, Tensor]) -> None:
    found = read_tensors(partial)
    for name, tensor in stored.items():
        if name not in found or not _same_bytes(found[name], tensor):
            raise OSError(f"what was written of {name} reads back otherwise")


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    same_form = (a.shape, a.dtype) == (b.shape, b.dtype)
    return same_form and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _linked(source: Path, target: Path) -> None:
    """The same file or folder at a second place, without copying where that can be."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b, follow_symlinks=False)
        except OSError:
            shutil.copy2(a, b, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, copy_function=link, symlinks=True)
    else:
        link(str(source), str(target))


_EXCHANGE, _HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of Linux's renameat2."""


def _exchange(new: Path, place: Path) -> None:
    """Put one directory in another's place: at once where the system can, else by way of a third name."""
    if _swapped(new, place):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    place.rename(old)
    try:
        new.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swapped(a: Path, b: Path) -> bool:
    """Whether the system has exchanged two directories in one step."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False  # another system than Linux
    return bool(swap(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0)


def _clear_remains(directory: Path) -> None:
    """Remove what killed runs have left beside the place, and put back what they had moved away."""
    for left in directory.parent.glob(f".{directory.name}.*"):
        process, _, kind = left.name.removeprefix(f".{directory.name}.").partition(".")
        if kind not in ("partial", "old") or not is_left_over(process):
            continue
        if kind == "old" and not directory.exists():
            left.rename(directory)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _umask() -> int:
    """The process's umask; safetensors ignores it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the directory stands, then deliver them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {s: signal.signal(s, lambda number, _: arrived.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _missing_parents(path: Path) -> list[Path]:
    """The parents that have to be made, the deepest first."""
    return [parent for parent in path.parents if not parent.exists()]

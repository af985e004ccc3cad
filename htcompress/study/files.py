"""Which files a task is made of: its modules, and the data that it opens. A point of a study is theirs."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_WHOLE = 1 << 26
"""Bytes up to which a file is told by its contents; a larger one by its size and its time."""

_listening: list[set[str]] = []


def fingerprint(file: str) -> str | None:
    """What tells whether a file has changed; None where there is no such file."""
    path = Path(file)
    try:
        size = path.stat().st_size
        if size > _WHOLE:
            return f"{size} {path.stat().st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def changed(files: Mapping[str, str]) -> bool:
    """Whether any of the files is not what it was."""
    return any(fingerprint(file) != known for file, known in files.items())


@contextmanager
def files_used(*, apart: str) -> Iterator[dict[str, str]]:
    """Gathers the files that are opened for reading while this lasts, and those of the modules that are there then.

    Python's own, installed packages and htcompress are left out, and the file `apart`. The mapping is filled at the
    end.
    """
    _listen()
    opened: set[str] = set()
    found: dict[str, str] = {}
    _listening.append(opened)
    try:
        yield found
    finally:
        _listening.remove(opened)
        modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        for name in sorted({*opened, *(str(file) for file in modules if file)}):
            path = Path(name).resolve()
            if _own(path) and path != Path(apart).resolve() and (known := fingerprint(str(path))) is not None:
                found[str(path)] = known


@cache
def _listen() -> None:
    """Hear of opened files from now on: once for the process, for Python lets no listener go."""
    sys.addaudithook(_heard)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _listening:
        return
    path, mode = arguments[0], arguments[1]
    if isinstance(path, str | bytes | Path) and (mode is None or not set("wax+") & set(str(mode))):
        name = path.decode(errors="replace") if isinstance(path, bytes) else str(path)
        for listener in _listening:
            listener.add(name)


_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
_PACKAGE = Path(__file__).resolve().parent.parent


def _own(path: Path) -> bool:
    """Whether a file is the user's: no part of Python, of a package, of the system or of htcompress."""
    if not path.is_file() or path.suffix == ".pyc" or "site-packages" in path.parts:
        return False
    return not any(path.is_relative_to(place) for place in (*_INSTALLED, _PACKAGE, Path("/proc"), Path("/sys")))

"""The programs of C as one library.

Without a compiler, or with `HTCOMPRESS_COMPILED=0` in the environment, there is none: what would have called it
computes the same in torch or NumPy, but for rounding.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

SWITCH = "HTCOMPRESS_COMPILED"
"""The environment variable that switches it off where it is 0."""

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("program.c", "ranks.c", "rounding.c"))
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")


@cache
def library() -> ctypes.CDLL | None:
    """The program, built once for a machine and version; None where it is switched off or cannot be built or loaded."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if (found := _found(name))), None)
    if compiler is None:
        return None
    native = _cpu()
    flags = (*_FLAGS, *(("-march=native",) if native else ()))
    sources = [source.read_bytes() for source in _SOURCES]
    key = repr((sources, compiler, flags, native, platform.machine(), platform.system()))
    name = f"program-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (folder / name).exists():
                _build(compiler, flags, folder, name)
            return ctypes.CDLL(str(folder / name))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _found(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def _folders() -> Iterator[Path]:
    """Where it may be kept: in the user's caches, or else as long as this process lasts."""
    cache_home = os.environ.get("XDG_CACHE_HOME")
    if cache_home:
        yield Path(cache_home) / "htcompress"
    with suppress(RuntimeError):  # a user without a home
        yield Path.home() / ".cache" / "htcompress"
    own = tempfile.mkdtemp(prefix="htcompress-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    yield Path(own)


def _build(compiler: str, flags: Sequence[str], folder: Path, name: str) -> None:
    """Compile it beside its place and put it there in one step: others may be doing the same."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / name
        command = [compiler, *flags, "-o", str(made), *map(str, _SOURCES)]
        subprocess.run(command, check=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        os.replace(made, folder / name)


def _cpu() -> str:
    """What this processor can do, for whose sake a program may not run on another; empty where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")

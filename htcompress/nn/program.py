"""A small program of C that does what torch's kernels do not do fast: built when it is first needed, or done without.

Without a compiler, or with `HTCOMPRESS_COMPILED=0` in the environment, torch computes everything, and gives the same
but for rounding.
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

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.nn.tracing import is_tracing

SWITCH = "HTCOMPRESS_COMPILED"
"""The environment variable that switches it off where it is 0."""

_SOURCE = Path(__file__).with_name("program.c")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")

_WIDE, _THIN, _SEVERAL = 4096, 64, 16
"""A product is wide and thin from so many inputs on, up to such a rank; so many vectors torch shares among threads."""


def usable(*tensors: Tensor) -> bool:
    """Whether the program can read tensors, and nothing is to be learnt or looked on at: on a CPU, in float32."""
    if torch.is_grad_enabled() or is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if any(t.device.type != "cpu" or t.dtype is not torch.float32 for t in tensors):
        return False
    try:
        return all(isinstance(t, Tensor) and t.data_ptr() for t in tensors) and library() is not None
    except RuntimeError:  # tensors without memory of their own, as torch.func makes them
        return False


def is_thin(x: Float[Tensor, "vectors inputs"], factor: Float[Tensor, "inputs r"]) -> bool:
    """Whether `thin_product` is the faster way; the arguments are usable."""
    vectors, inputs = x.shape
    alone = vectors < _SEVERAL or torch.get_num_threads() == 1
    return alone and inputs >= _WIDE and factor.shape[1] <= _THIN and factor.stride(1) == 1 <= factor.stride(0)


def thin_product(x: Float[Tensor, "vectors inputs"], factor: Float[Tensor, "inputs r"]) -> Float[Tensor, "vectors r"]:
    """x C for few vectors, many inputs and a small r, where reading is what it takes; see `is_thin`."""
    program = library()
    if program is None:
        raise RuntimeError("There is no program to run; see `usable`.")
    x = x.contiguous()
    out = x.new_empty(len(x), factor.shape[1])
    sizes = (ctypes.c_int64(n) for n in (*x.shape, factor.shape[1], factor.stride(0)))
    program.thin_product(*sizes, *(ctypes.c_void_p(t.data_ptr()) for t in (x, factor, out)))
    return out


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
    key = repr((_SOURCE.read_bytes(), compiler, flags, native, platform.machine(), platform.system()))
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
        command = [compiler, *flags, "-o", str(made), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        os.replace(made, folder / name)


def _cpu() -> str:
    """What this processor can do, for whose sake a program may not run on another; empty where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")

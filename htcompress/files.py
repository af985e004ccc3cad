"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from htcompress.errors import RequestError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A place beside a file that takes the file's once it is written; what was there stays if it cannot be.

    What killed runs have left of their own is removed. Raises `RequestError` where the file cannot be written.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        for left in file.parent.glob(f".{glob.escape(file.name)}.*.partial"):
            if is_left_over(left.name.removeprefix(f".{file.name}.").removesuffix(".partial")):
                left.unlink(missing_ok=True)
        yield partial
        partial.replace(file)
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"{file} cannot be written: {reason}. Make room, or give another place.") from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write a text file by way of a place beside it. Raises `RequestError` where it cannot be written."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def is_left_over(process: str) -> bool:
    """Whether the number of a process in a file's name is that of one that is no more."""
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except (OverflowError, ProcessLookupError):
        return True
    except OSError:
        return False
    return False

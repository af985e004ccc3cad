"""The errors that htcompress raises on purpose: one family, each member with its process exit code."""

from __future__ import annotations

import re


class HTCompressError(Exception):
    """Base of every error that names a user's thing, what was expected of it, and the next step.

    `exit_code` is what the command line returns when this error ends a command.
    """

    exit_code = 2

    def __init__(self, message: object = "", *others: object) -> None:
        super().__init__(_readable(str(message)), *others)


_LONGEST_WORD = 1000
"""No path or name that a message repeats is longer; hostile files have names of megabytes."""


def _readable(message: str) -> str:
    return re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda found: found[0][:100] + "...", message)


class CheckpointError(HTCompressError):
    """A checkpoint or an output directory cannot be read, or holds nothing to compress."""


class TaskError(HTCompressError):
    """A task file is missing, broken, lacks a name that is needed, or raised while it ran."""


class ShapeError(HTCompressError, ValueError):
    """Sizes that do not fit: a tensor against its tree, a matrix against its layout."""


class RequestError(HTCompressError, ValueError):
    """A request that makes no sense: a negative error, two goals at once, an unknown scope."""


class UnreachableError(HTCompressError):
    """The goal is meaningful but cannot be reached; the message gives the nearest one that can.

    Attributes:
        least: the fewest numbers that can be stored.
    """

    exit_code = 3

    def __init__(self, message: str, *, least: int) -> None:
        super().__init__(message)
        self.least = least

"""Where commands write: results to stdout, progress to stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from htcompress_cli.screen import Screen


def open_screen(quiet: bool) -> Screen:
    """What shows stages and progress, on stderr."""
    from htcompress_cli.screen import Screen

    return Screen(quiet=quiet)


def result_console() -> Console:
    """Where results go: stdout, 80 columns wide where it is no terminal."""
    from rich.console import Console

    class Results(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to the entry point: a reader that has seen enough is no failed check."""
            raise BrokenPipeError

    # No markup: layers, metrics and files bear the names that the user gave them.
    return Results(width=80 if not sys.stdout.isatty() else None, highlight=False, markup=False, emoji=False)

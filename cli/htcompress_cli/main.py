"""The entry point: one family of errors becomes messages and exit codes, signals become 130.

Nothing slow is imported before the signals are looked after.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import weakref
from contextlib import redirect_stdout
from types import FrameType
from typing import TYPE_CHECKING

from htcompress.errors import HTCompressError

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


class _Interrupt(KeyboardInterrupt):
    """An interrupt of which can be told whether anybody still holds it."""


_PATIENCE = 0.1
"""Seconds after which an interrupt is looked at that may have been lost."""

_LATER = 1.0
"""Seconds by which other processes of a launch end after the first, where an error ends all of them."""


def run() -> None:
    """Run the command line in `sys.argv` and leave the process with the contract's exit code."""
    arrived: list[int] = []
    raised: weakref.ref[_Interrupt] | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        arrived.append(number)
        error = _Interrupt()
        raised = weakref.ref(error)
        _remind_every(_PATIENCE)
        try:
            raise error
        finally:
            del error  # its traceback holds this frame: dropped, it would live until objects are looked through

    def remind(number: int, frame: FrameType | None) -> None:
        # In a finaliser or a callback of C code an exception is dropped: the command would go on.
        if raised is not None and raised() is None:
            interrupt(number, frame)

    def unraisable(lost: UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, _Interrupt):
            hook(lost)

    for number in (signal.SIGINT, signal.SIGTERM):
        # Who ignores a signal from the start (nohup, a job in the background) goes on ignoring it.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, remind)
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        code = _command()
    except BrokenPipeError:
        code = 0
    except BaseException as error:
        _deafen()
        code = _explained(error, interrupted=bool(arrived))
    _deafen()
    sys.unraisablehook = hook
    _leave(code)


def _explained(error: BaseException, *, interrupted: bool) -> int:
    """Say what ended the command; its exit code. An interrupt may arrive as another error: imports turn it into one."""
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    if interrupted or isinstance(error, KeyboardInterrupt):
        if not _follows():
            _complain("interrupted; no output was left half-written.")
        return 130
    if isinstance(error, HTCompressError):
        _complain(str(error))
        return error.exit_code
    if isinstance(error, SystemExit):
        if _follows():
            # A launcher stops all when one ends; the first has something to say.
            time.sleep(_LATER)
        raise error
    # Usage errors of the parser are known by what they can do, for typer carries a click of its own.
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        command = "htcompress" if context is None else context.command_path
        if not _follows():
            _complain(f"{error.format_message().rstrip('.')}. See {command} --help.")
        return 2
    _complain(
        f"unexpected {type(error).__name__}: {error}. This is a fault of htcompress or of the task's code; --debug "
        f"shows the traceback, which is worth a bug report."
    )
    return 2


def _command() -> int:
    """Parse and run; the parser's own ways to end become exit codes."""
    import typer.main

    from htcompress_cli.commands import app

    # What a character set cannot show becomes a question mark: never a reason to fail after the work is done.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    alone = len(sys.argv) == 1
    try:
        if alone:
            # Help that nobody asked for is a message, not a result.
            with redirect_stdout(sys.stderr):
                command.make_context("htcompress", ["--help"])
        # Not `app()`: it swallows interrupts and broken pipes.
        with command.make_context("htcompress", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return 2 if alone else end.exit_code
    return 0


def _leave(code: int) -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _deafen() -> None:
    """Ignore further signals: what is left to do is short."""
    _remind_every(0.0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _remind_every(seconds: float) -> None:
    """Let SIGALRM come so often, or no more; not on Windows, which has none."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


def _follows() -> bool:
    """Whether a launcher has started this process beside a first one, which tells what is the same for all."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def _complain(text: str) -> None:
    print(f"htcompress: {text}", file=sys.stderr)

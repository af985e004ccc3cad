"""What the user sees while work goes on: stages and progress on stderr, bars on a terminal only."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from htcompress.observer import Observer


@contextmanager
def _to_stderr() -> Iterator[None]:
    """What is printed goes to stderr, by processes that the task's code starts too: stdout is the result's."""
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        try:
            out, err = sys.__stdout__.fileno(), sys.__stderr__.fileno()  # type: ignore[union-attr]
            kept = os.dup(out)
        except (AttributeError, OSError, ValueError):
            yield  # no files behind them
            return
        stack.callback(os.close, kept)
        stack.callback(os.dup2, kept, out)
        os.dup2(err, out)
        yield


class Screen(Observer):
    """Draws the stages of a command: a bar for each on a terminal, a line for each elsewhere.

    What the task's code prints meanwhile goes to stderr as well: stdout is the result's.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.quiet = quiet
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Screen:
        self._stack.enter_context(_to_stderr())
        if self.quiet:
            self._stack.enter_context(warnings.catch_warnings(action="ignore"))
        elif self.console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[detail]}"),
                console=self.console,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            if kind is None:
                self._finish()
            self._progress.stop()
        self._stack.close()

    def stage(self, name: str, total: int | None = None) -> None:
        if self._progress is not None:
            self._finish()
            self._task = self._progress.add_task(name, total=total, detail="")
        elif not self.quiet:
            self.console.print(f"{name} ...", style="dim")

    def advance(self, done: int, detail: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, detail=detail)

    def message(self, text: str) -> None:
        if not self.quiet:
            self.console.print(Text.assemble(("note: ", "yellow"), text), soft_wrap=True)

    def _finish(self) -> None:
        if self._progress is not None and self._task is not None:
            task = self._progress.tasks[-1]
            total = task.total if task.total is not None else 1
            self._progress.update(self._task, total=total, completed=total)

"""Commands run in process, as the entry point runs them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from htcompress_cli import main
from small import Outcome

Command = Callable[..., Outcome]


@pytest.fixture
def htc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command line with an empty folder as the present one."""
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["htcompress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.run()
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, *capsys.readouterr())

    yield run
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)

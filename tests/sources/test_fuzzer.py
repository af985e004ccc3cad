"""The fuzzer sees what it looks for: readers that are wrong on purpose, each told and its very input kept."""

from __future__ import annotations

import importlib
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from htcompress.errors import CheckpointError


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "robustness"))
    return importlib.import_module("fuzz")


def burns(_: Path) -> None:
    until = time.process_time() + 0.6
    while time.process_time() < until:
        pass


def fills(_: Path) -> None:
    data = bytearray(200 << 20)
    data[:: 1 << 12] = b"x" * len(data[:: 1 << 12])


def sleeps(_: Path) -> None:
    time.sleep(30)


def unpickles(folder: Path) -> None:
    readers = importlib.import_module("readers")
    pickle.loads(pickle.dumps(readers.Bomb()))
    assert (folder / "marker").exists()


def told_at_length(_: Path) -> None:
    raise CheckpointError("word " * 1000)


def raises(_: Path) -> None:
    raise KeyError("of nobody")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another exception": (raises, "KeyError at test_fuzzer.py"),
    "a long message": (told_at_length, "a message of 5000 letters"),
    "time": (burns, " s"),
    "memory": (fills, "MB more of memory"),
    "patience": (sleeps, "more than 2 s"),
    "the process": (lambda _: os._exit(7), "the process ended with 7"),
    "code": (unpickles, "code of the input ran"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_seen_and_their_inputs_kept(
    case: str, fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm, words = FAULTS[case]
    kept = tmp_path / "kept"

    def make(rng: random.Random) -> bytes:
        return (b"bad " if rng.random() < 0.2 else b"good") + str(rng.random()).encode()

    def read(data: bytes, folder: Path) -> None:
        if data.startswith(b"bad"):
            harm(folder)

    readers = importlib.import_module("readers")
    monkeypatch.setattr(fuzz, "READERS", {"made up": readers.Reader(make, read)})
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "_PATIENCE", 2.0)
    monkeypatch.setattr(fuzz, "MEMORY", 100 << 20)
    tallies, found = fuzz.fuzz(12, 1, kept)
    bad = {index: data for index in range(12) if (data := fuzz.drawn(1, index)[1]).startswith(b"bad")}
    assert 1 <= len(bad) < 6
    assert [outcome.index for outcome in found] == list(bad)
    assert all(words in outcome.words for outcome in found)
    assert tallies["made up"].outcomes == {"accepted": 12 - len(bad), "fault": len(bad)}
    # Each file is the input of its number, and no later one.
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {f"1-{k}-made_up": d for k, d in bad.items()}

"""export: what it writes and says; bad calls leave nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import Outcome, Tagger, listing, tagger, write_task

import htcompress

Command = Callable[..., Outcome]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    htcompress.save(htcompress.compress(tagger(), budget=400), tmp_path / "out")
    write_task(tmp_path / "task.py")
    return tmp_path


def test_dense(htc: Command, folder: Path) -> None:
    ended = htc("export", "out", "model.pt", "--to", "dense")
    assert ended.code == 0
    assert ended.out.startswith(" written to model.pt  (")
    assert ended.err.splitlines() == ["writing out the matrices ..."]
    Tagger().load_state_dict(torch.load(folder / "model.pt"), strict=True)


def test_onnx(htc: Command, folder: Path) -> None:
    ended = htc("export", "out", "layer.onnx", "--to", "onnx", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    first, second = ended.out.splitlines()
    assert first.startswith(" written to layer.onnx  (")
    assert second.startswith(" largest difference between onnxruntime and torch: ")
    ended = htc("export", "out", "model.onnx", "--to", "onnx", "--task", "task.py")
    assert ended.code == 0, ended.err
    assert ended.err.splitlines() == ["exporting the model ...", "comparing with onnxruntime ..."]
    assert (folder / "model.onnx").stat().st_size < 20_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("out", "model.pt"), ("--to",)),
        (("out", "model.pt", "--to", "tflite"), ("--to", "dense, onnx", "tflite")),
        (("gone", "model.pt", "--to", "dense"), ("no directory gone",)),
        ((".", "model.pt", "--to", "dense"), ("not an output directory",)),
        (("out", "gone/model.pt", "--to", "dense"), ("no folder gone",)),
        (("out", "out", "--to", "dense"), ("out is a directory",)),
        (("out", "model.onnx", "--to", "onnx", "--task", "gone.py"), ("gone.py",)),
        (("out", "model.onnx", "--to", "onnx", "--task", "task.py", "--lengths"), ("--lengths", "without --task")),
    ],
)
def test_bad_calls(htc: Command, folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = listing(folder)
    ended = htc("export", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    for word in words:
        assert word in ended.err
    assert listing(folder) == before


def test_a_missing_package_is_named(htc: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ended = htc("export", "out", "model.onnx", "--to", "onnx")
    assert (ended.code, ended.out) == (2, "")
    assert "onnxruntime, which is not installed: pip install 'htcompress[onnx]'" in ended.err


def test_a_full_disk_leaves_what_was_there(htc: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.pt").write_text("an older one")
    before = listing(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    ended = htc("export", "out", "model.pt", "--to", "dense")
    assert ended.code == 2
    assert "model.pt cannot be written: [Errno 28] No space left on device" in ended.err
    assert listing(folder) == before

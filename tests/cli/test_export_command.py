"""export: what it writes and says; bad calls leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from small import Outcome, Tagger, clips, listing, tagger, write_task

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
    assert "model.pt cannot be written: No space left on device. Make room" in ended.err
    assert listing(folder) == before


def test_what_a_killed_run_has_left_is_removed(htc: Command, folder: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / f".model.pt.{gone.pid}.partial").write_text("half")
    (folder / ".model.pt.1.partial").write_text("of a process that runs")
    (folder / ".model.pt.mine.partial").write_text("the user's own")
    assert htc("export", "out", "model.pt", "--to", "dense").code == 0
    assert sorted(path.name for path in folder.glob(".model*")) == [".model.pt.1.partial", ".model.pt.mine.partial"]


def test_a_fault_of_the_tasks_code_is_none_of_the_disk(htc: Command, folder: Path) -> None:
    write_task(folder / "task.py", "def calibration():\n    yield torch.zeros(8, 5, 7)\n")
    before = listing(folder)
    ended = htc("export", "out", "model.onnx", "--to", "onnx", "--task", "task.py")
    assert ended.code == 2
    assert "cannot be written" not in ended.err
    assert "(8, 5, 7)" in ended.err
    assert listing(folder) == before


def test_a_class_in_place_of_a_task(htc: Command, folder: Path) -> None:
    x = torch.cat([clips(seed) for seed in range(4)])
    np.savez(folder / "x.npz", x=x.numpy())
    command = ("export", "out", "model.onnx", "--to", "onnx", "--model", "task.py:Tagger")
    ended = htc(*command, "--calibration", "x.npz")
    assert ended.code == 0, ended.err
    found = onnxruntime.InferenceSession("model.onnx").run(None, {"x": x.numpy()})[0]
    assert torch.from_numpy(found).allclose(htcompress.load(folder / "out", Tagger().eval())(x), atol=1e-5)
    assert "give --calibration X.npz" in htc(*command).err
    ended = htc("export", "out", "model.onnx", "--to", "onnx", "--calibration", "x.npz")
    assert (ended.code, "--calibration is for --model" in ended.err) == (2, True)


def test_sizes_that_are_fixed_are_printed(htc: Command, folder: Path) -> None:
    write_task(
        folder / "task.py",
        "class Counting(Tagger):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x)[torch.arange(len(x))]\n\n\n"
        "def model():\n    return Counting()",
    )
    ended = htc("export", "out", "model.onnx", "--to", "onnx", "--task", "task.py")
    assert ended.code == 0, ended.err
    assert " axis 0 of x is fixed at 8: the model takes others in torch, this file does not" in ended.out.splitlines()


def test_the_nonlinearity_is_asked_for(htc: Command, folder: Path) -> None:
    torch.save(torch.nn.RNN(24, 8, nonlinearity="relu").state_dict(), folder / "rnn.pt")
    assert htc("convert", "rnn.pt", "--budget", "200", "-o", "rnn").code == 0
    ended = htc("export", "rnn", "rnn.onnx", "--to", "onnx")
    assert (ended.code, ended.out) == (2, "")
    assert "--nonlinearity tanh or --nonlinearity relu" in ended.err
    assert htc("export", "rnn", "rnn.onnx", "--to", "onnx", "--nonlinearity", "relu").code == 0

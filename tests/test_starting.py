"""`init` writes a task that names what is in a checkpoint; filled in, it is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import Outcome, save_tagger
from torch import nn

Command = Callable[..., Outcome]


def test_a_task_to_fill_in(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tagger(tmp_path / "model.pt")
    ended = htc("init", "model.pt")
    assert (ended.code, ended.out) == (0, "written to task.py\n")
    text = Path("task.py").read_text()
    assert "#   rnn: nn.LSTM(24, 8)\n" in text
    assert "#   head.weight (3, 8)\n" in text
    # As it is, it says what is missing.
    ended = htc("convert", "model.pt", "--budget", "400", "--task", "task.py")
    assert ended.code == 2
    assert "TODO" in ended.err
    lines = text.split("\n")
    text = "\n".join(line for line in lines if "raise NotImplementedError" not in line)
    filled = text.replace("def model():\n", "def model():\n    from small import tagger\n    return tagger()\n")
    filled = filled.replace(
        "    yield None\n", "    for _ in range(3):\n        yield torch.zeros(4, 6, 24), torch.zeros(4).long()\n"
    )
    filled = filled.replace('"""The metric of the report, on data that nothing above has seen."""', "return 1.0")
    Path("task.py").write_text(filled)
    ended = htc("convert", "model.pt", "--budget", "400", "--task", "task.py", "--steps", "2", "-o", "out")
    assert ended.code == 0, ended.err


def test_layers_are_told_as_they_are_made(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"a": nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3), "b": nn.GRUCell(4, 3, bias=False)})
    torch.save(model.state_dict(), "model.pt")
    assert htc("init", "model.pt", "-o", "mine.py").code == 0
    text = Path("mine.py").read_text()
    assert "#   a: nn.LSTM(6, 5, num_layers=2, bidirectional=True, proj_size=3)\n" in text
    assert "#   b: nn.GRUCell(4, 3, bias=False)\n" in text
    ended = htc("init", "model.pt", "-o", "mine.py")
    assert ended.code == 2
    assert "mine.py exists, and is left as it is" in ended.err

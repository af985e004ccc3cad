"""Faults of kinds 9, 10 and 20: which weights of a file are taken, and what lies beside a task."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from fault_models import Command, near
from small import Tagger, clips, save_tagger, tagger, write_task

import htcompress
from htcompress.request import Goal


def test_10_averaged_weights_are_named_and_can_be_chosen(tmp_path: Path, htc: Command) -> None:
    raw, averaged = tagger(0).state_dict(), tagger(1).state_dict()
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    arguments = ("convert", "model.pt", "--budget", "10m", "--task", "task.py", "--no-finetune", "-o")
    plain = htc(*arguments, "raw")
    assert "also holds state_dict_ema" in plain.err
    assert htc(*arguments, "ema", "--weights", "state_dict_ema").code == 0
    assert near(htcompress.load(tmp_path / "raw", Tagger())(clips()), tagger(0)(clips()))
    assert near(htcompress.load(tmp_path / "ema", Tagger())(clips()), tagger(1)(clips()))


SPLIT_TASK = """
def model():
    from net import Tagger
    return Tagger()

def calibration():
    from torch.utils.data import DataLoader
    from data import Clips
    for x, _ in DataLoader(Clips(), batch_size=4, num_workers=2, multiprocessing_context="spawn"):
        yield x
"""

NET = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(24, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        from late import last
        return self.head(last(self.rnn(x)[0]))
"""

DATA = """
import torch

class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        import late
        return torch.randn(5, 24, generator=torch.Generator().manual_seed(index)), 1
"""


def test_20_a_tasks_neighbours_are_found_at_any_time(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    for name, text in {
        "task": SPLIT_TASK,
        "net": NET,
        "data": DATA,
        "late": "def last(x):\n    return x[:, -1]\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    save_tagger(folder / "model.pt")
    program = "from htcompress_cli.main import run\nif __name__ == '__main__':\n    run()\n"
    (tmp_path / "main.py").write_text(program)
    command = ["main.py", "convert", "deep/model.pt", "--budget", "300", "--task", "deep/task.py", "--no-finetune"]
    ended = subprocess.run(
        [sys.executable, *command, "-o", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "report.json").is_file()


def test_20_classes_of_a_task_reach_spawned_workers(tmp_path: Path) -> None:
    text = (
        "class Own(torch.utils.data.Dataset):\n    def __len__(self):\n        return 8\n"
        "    def __getitem__(self, index):\n        return torch.full((5, 24), float(index))\n\n"
        "def calibration():\n    return torch.utils.data.DataLoader(Own(), batch_size=4, num_workers=1, "
        'multiprocessing_context="spawn")'
    )
    write_task(tmp_path / "task.py", text)
    made = htcompress.convert(
        save_tagger(tmp_path / "model.pt"), goal=Goal(budget=300), task=tmp_path / "task.py", finetuning=None
    )
    assert made.report.timings_s.statistics is not None

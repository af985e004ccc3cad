"""Faults of kind 21: whatever is of no other kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_models import Words
from small import save_tagger, write_task
from torch import Tensor, nn

import htcompress
from htcompress.errors import CheckpointError, HTCompressError, RequestError, TaskError
from htcompress.report import read_report
from htcompress.request import FineTuning


def test_21_sparse_gradients() -> None:
    tokens = [torch.randint(60, (4, 7)) for _ in range(4)]
    result = htcompress.compress(
        Words(sparse=True), budget=4000, calibration=tokens, training=tokens, finetuning=FineTuning(steps=3)
    )
    assert result.report.totals.parameters_after <= 4000


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -3},
        {"steps": 2.5},
        {"check_every": 0},
        {"time_limit": 0},
        {"time_limit": float("nan")},
        {"learning_rate": -1},
        {"patience": 0},
        {"held_out": 0},
        {"clip": 0},
        {"hidden": -1},
    ],
)
def test_21_fine_tuning_is_validated(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options)).replace("_", " ")):
        FineTuning(**options)


def test_21_a_layers_second_name(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.LSTM(24, 8, batch_first=True)
            self.alias = self.encoder

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(x)[0]

    assert list(htcompress.compress(Named(), budget=400, layers="alias").modules) == ["encoder"]


def test_21_subprocesses_do_not_write_into_the_json(tmp_path: Path) -> None:
    write_task(tmp_path / "task.py", "import subprocess\nsubprocess.run(['echo', 'hello'])\nprint('loaded')")
    save_tagger(tmp_path / "model.pt")
    command = ["convert", "model.pt", "--budget", "300", "--task", "task.py", "--no-finetune", "--json", "-o", "out"]
    ended = subprocess.run(
        [sys.executable, "-c", "from htcompress_cli.main import run; run()", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert htcompress.Report.from_json(ended.stdout).totals == read_report(tmp_path / "out").totals
    assert "hello" in ended.stderr


def test_every_refusal_is_ours() -> None:
    for error in (CheckpointError, RequestError, TaskError):
        assert issubclass(error, HTCompressError)

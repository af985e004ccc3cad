"""Faults of kind 8: tied layers taken for several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fault_models import BEYOND, compact, near
from small import clips
from torch import Tensor, nn

import htcompress
from htcompress.request import Goal


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(24, 24, batch_first=True)
        self.second = nn.LSTM(24, 24, batch_first=True)
        for name, parameter in list(self.first.named_parameters()):
            setattr(self.second, name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


@pytest.mark.parametrize("with_data", [False, True])
def test_8_tied_layers_are_one(with_data: bool, tmp_path: Path) -> None:
    model = Tied().eval()
    data = {"calibration": [clips()]} if with_data else {}
    numbers = sum(p.numel() for p in model.parameters())
    result = htcompress.compress(model, budget=1500, **data)
    assert result.model is not None
    assert list(result.modules) == ["first"]
    assert result.report.totals.parameters_before == numbers
    assert 1000 < result.report.totals.parameters_after <= 1500
    words = sum(b.numel() for b in result.model.buffers())
    assert sum(p.numel() for p in result.model.parameters()) + words == result.report.totals.parameters_after
    htcompress.save(result, tmp_path / "out")
    assert torch.equal(htcompress.load(tmp_path / "out", Tied().eval())(clips()), result.model(clips()))
    assert near(compact(model, **data)(clips()), model(clips()))


def test_8_tied_layers_without_a_task(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = Tied().eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_model(model, str(tmp_path / "model.safetensors"))
    for name in ("model.pt", "model.safetensors"):
        made = htcompress.convert(tmp_path / name, goal=Goal(budget=BEYOND))
        assert made.report.totals.parameters_before == sum(p.numel() for p in model.parameters())
        htcompress.save(made, tmp_path / "out")
        assert near(htcompress.load(tmp_path / "out", Tied().eval())(clips()), model(clips()))
    assert (
        tmp_path / "out" / "model.safetensors"
    ).stat().st_size < 1.2 * 4 * made.report.totals.parameters_after + 3000

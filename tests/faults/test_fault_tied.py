"""Faults of kind 8: tied layers taken for several, and layers that nothing was seen of."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from fault_models import BEYOND, compact, near
from small import Listener, clips
from torch import Tensor, nn

import htcompress
from htcompress.errors import CheckpointError
from htcompress.exporting.dense import dense_tensors
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


class Named(nn.Module):
    """One module under two names, one of them in a block that stands twice, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(24, 24, batch_first=True)
        self.decoder = self.encoder
        self.blocks = nn.ModuleList([nn.Sequential(nn.LSTM(24, 24, batch_first=True))] * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.decoder(self.encoder(x)[0])[0]
        for block in self.blocks:
            x = block(x)[0]
        return x


@pytest.mark.parametrize("budget", [3000, "3kB"])
def test_8_a_module_under_two_names_is_loaded(budget: int | str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Named().eval()
    result = htcompress.compress(model, budget=budget, calibration=[clips()])  # type: ignore[arg-type]
    assert list(result.modules) == ["encoder", "blocks.0.0"]
    htcompress.save(result, tmp_path / "out")
    assert torch.equal(htcompress.load(tmp_path / "out", Named().eval())(clips()), result.model(clips()))


class Half(nn.Module):
    """Two layers of one W_hh, which a head reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(24, 24, batch_first=True)
        self.second = nn.LSTM(24, 24, batch_first=True)
        self.head = nn.Linear(24, 96)
        self.second.weight_hh_l0 = self.head.weight = self.first.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0])


SHARED = ["first.weight_hh_l0", "second.weight_hh_l0", "head.weight"]


@pytest.mark.parametrize("with_data", [False, True])
def test_8_a_single_weight_of_several_layers(with_data: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, listener = Half().eval(), Listener()
    if with_data:
        made = htcompress.compress(model, budget=3000, calibration=[clips()], observer=listener)
    else:
        torch.save(model.state_dict(), tmp_path / "model.pt")
        made = htcompress.convert(tmp_path / "model.pt", goal=Goal(budget=3000), observer=listener)
    assert any(all(name in said for name in SHARED) for said in listener.messages)
    htcompress.save(made, tmp_path / "out")
    if made.model is not None:
        assert torch.equal(htcompress.load(tmp_path / "out", Half().eval())(clips()), made.model(clips()))
    with pytest.raises(CheckpointError, match="are one tensor in the model"):
        dense_tensors(tmp_path / "out")


def test_8_a_single_weight_that_stays_is_written() -> None:
    model = Half().eval()
    made = htcompress.compress(model, ratio=1.0, calibration=[clips()])
    with tempfile.TemporaryDirectory() as folder:
        htcompress.save(made, folder + "/out")
        found = Half()
        found.load_state_dict(dense_tensors(folder + "/out"))
    assert near(found.eval()(clips()), model(clips()))


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.usual = nn.LSTM(24, 12, batch_first=True)
        self.seldom = nn.LSTM(24, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return (self.seldom if len(x) > 16 else self.usual)(x)[0]


def test_8_a_layer_that_calibration_never_runs_stays() -> None:
    torch.manual_seed(0)
    model = Sometimes().eval()
    result = htcompress.compress(model, budget=700, calibration=[clips(), clips(6)])
    assert list(result.modules) == ["usual"]
    assert "passes through it" in result.report.left["seldom"]
    many = clips(7, 20)
    assert torch.equal(result.model(many), model(many))

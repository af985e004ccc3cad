"""Faults of kinds 11 to 16: crashes, or refusals of sound input."""

from __future__ import annotations

import copy
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from crossing import crossed
from fault_models import BEYOND, Around, Words, compact, near
from small import Tagger, clips, tagger
from torch import Tensor, nn

import htcompress
from htcompress.request import FineTuning


def test_12_one_unit_stays_dense() -> None:
    model = nn.LSTM(16, 1)
    result = htcompress.compress(model, ratio=1.1, calibration=[torch.randn(6, 4, 16)])
    assert result.model is not None
    assert near(
        compact(model, calibration=[torch.randn(6, 4, 16)])(torch.ones(2, 1, 16))[0], model(torch.ones(2, 1, 16))[0]
    )


def test_13_inputs_of_low_rank() -> None:
    tokens = torch.randint(60, (16, 70))
    model = Words(size=256)
    result = htcompress.compress(model, budget=300_000, calibration=[tokens], scope="input", layout="svd")
    assert result.report.totals.parameters_after <= 300_000


@pytest.mark.parametrize(
    ("kind", "dtype"),
    crossed(list(product([nn.LSTM, nn.GRU, nn.RNN], [torch.float16, torch.bfloat16, torch.float32, torch.float64])), 1),
)
def test_14_every_precision(dtype: torch.dtype, kind: type[nn.Module], tmp_path: Path) -> None:
    model = Around(kind(24, 8, batch_first=True)).to(dtype).eval()
    x = clips().to(dtype)
    data = [clips(seed).to(dtype) for seed in range(4)]
    plain = htcompress.compress(model, budget=400)
    assert plain.model is not None
    assert plain.model(x).dtype == dtype
    tuned = htcompress.compress(
        model, budget=400, calibration=data, training=data, finetuning=FineTuning(steps=5, check_every=5)
    )
    assert tuned.model is not None
    assert {p.dtype for p in tuned.model.parameters()} == {dtype}
    assert torch.isfinite(tuned.model(x)).all()
    htcompress.save(tuned, tmp_path / "out")
    again = htcompress.load(tmp_path / "out", Around(kind(24, 8, batch_first=True)).to(dtype).eval())
    assert torch.equal(again(x), tuned.model(x))
    tolerance = 30 * torch.finfo(dtype).eps
    assert near(compact(model, calibration=data)(x).double(), model(x).double(), tolerance)


def test_15_every_tensor_has_a_home_of_its_own() -> None:
    # A device that holds no numbers: whatever meets it by mistake fails at once.
    torch.set_default_device("meta")
    try:
        model = Around(nn.LSTM(24, 8, batch_first=True, device="cpu")).to_empty(device="cpu")
        with torch.device("cpu"):
            model = tagger()
            data = [clips(seed) for seed in range(4)]
        result = htcompress.compress(
            model, budget=400, calibration=data, training=data, finetuning=FineTuning(steps=3, check_every=2)
        )
    finally:
        torch.set_default_device(None)
    assert result.model is not None
    assert torch.isfinite(result.model(data[0])).all()


class Uncopyable(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.extra = nn.utils.spectral_norm(nn.Linear(3, 3))
        self.result = self.head.weight.sum() * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x)) * self.result


def test_16_models_that_cannot_be_copied() -> None:
    model = Uncopyable()
    model(clips())
    model.eval()
    with pytest.raises((RuntimeError, TypeError)):
        copy.deepcopy(model)
    result = htcompress.compress(
        model, budget=BEYOND, calibration=[clips()], evaluate=lambda m: float(m(clips()).sum())
    )
    assert result.model is not None
    assert near(result.model(clips()), model(clips()))

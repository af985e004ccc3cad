"""Faults of kind 4: the order of hidden units is seen from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fault_models import Around
from small import clips
from torch import Tensor, nn

import htcompress
from htcompress.request import FineTuning


class Prototypes(nn.Module):
    """Its class means live in a buffer that only `predict` reads; its last state is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 3)
        self.register_buffer("means", torch.randn(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        states, (self.last, _) = self.rnn(x)
        return self.head(states[:, -1])

    def predict(self, x: Tensor) -> Tensor:
        return torch.cdist(self.rnn(x)[0][:, -1], self.means)


def test_4_nobody_sees_the_order_of_units(tmp_path: Path) -> None:
    model = Prototypes().eval()
    data = [clips(seed) for seed in range(6)]
    result = htcompress.compress(model, budget=4000, layout="split", calibration=data)
    assert result.model is not None
    direction = result.modules["rnn"].directions()["l0"]
    assert direction.order is not None, "the case is about a stored order"
    assert result.report.totals.parameters_after == sum(
        value.numel() for name, value in result.tensors.items() if name.startswith("rnn.")
    )
    x = clips(9)
    wanted, _ = model.rnn(x)
    found, _ = result.model.rnn(x)
    # Each unit is most like itself.
    alike = torch.corrcoef(torch.cat([found.flatten(0, 1).T, wanted.flatten(0, 1).T]))[:32, 32:]
    assert float((alike.argmax(1) == torch.arange(32)).float().mean()) > 0.7
    htcompress.save(result, tmp_path / "out")
    again = htcompress.load(tmp_path / "out", Prototypes().eval())
    assert torch.equal(again.predict(x), result.model.predict(x))


def test_4_the_order_costs_nothing_where_nothing_is_folded() -> None:
    data = [clips(seed) for seed in range(4)]
    result = htcompress.compress(Prototypes(), budget=1500, layout="svd", calibration=data)
    assert result.modules["rnn"].directions()["l0"].order is None


@pytest.mark.parametrize("unit_order", ["keep", "readers", "auto"])
def test_4_a_switch(unit_order: str, tmp_path: Path) -> None:
    model = Around(nn.LSTM(24, 32, batch_first=True), 32).eval()
    data = [clips(seed) for seed in range(6)]
    result = htcompress.compress(
        model,
        budget=700,
        layout="split",
        calibration=data,
        training=data,
        unit_order=unit_order,
        finetuning=FineTuning(steps=2),
    )
    assert result.report.layers[0].units_reordered == (unit_order == "readers")
    assert (result.modules["rnn"].directions()["l0"].order is not None) == (unit_order == "auto")
    assert ("units" in result.config["layers"]["rnn"]) == (unit_order == "readers")


def test_4_units_are_moved_where_their_order_would_take_too_much() -> None:
    """The order of 256 units takes 53 numbers, which is more than a tenth of the budget."""
    model = Around(nn.RNN(24, 256, bias=False, batch_first=True), 256).eval()
    data = [clips(seed) for seed in range(6)]
    few, more = (htcompress.compress(model, budget=size, layout="split", calibration=data) for size in (520, 700))
    assert few.report.layers[0].units_reordered
    assert few.modules["rnn"].directions()["l0"].order is None
    assert not more.report.layers[0].units_reordered
    assert more.modules["rnn"].directions()["l0"].order is not None
    kept = htcompress.compress(model, budget=520, layout="split", calibration=data, unit_order="keep")
    lost = [r.report.layers[0].matrices[0].error["outputs"] for r in (few, kept)]
    assert lost[0] < lost[1]

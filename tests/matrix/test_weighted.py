"""The error of a stand-in, however small, against its definition."""

from __future__ import annotations

import pytest
import torch
from oracles import observed, weighted_error

from htcompress.forms.ht import HTMatrix
from htcompress.matrix import Layout, Metric, blocks, weighted
from htcompress.matrix.weighted import WeightedMatrix

ROWS, COLS = 12, 18
LAYOUTS = {
    "svd": Layout.order_two(ROWS, COLS),
    "split": Layout.split((3, 4), (6, 3)),
    "paired": Layout.paired((3, 4), (6, 3)),
}


@pytest.mark.parametrize("large", ["", "matrix", "factors"])
@pytest.mark.parametrize("data", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_error_is_its_definition(layout: str, data: bool, large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(blocks, "DOUBLED", 0)
    if large == "factors":
        monkeypatch.setattr(weighted, "DOUBLED", 0)
        monkeypatch.setattr(weighted, "LARGE", 0)
    generator = torch.Generator().manual_seed(0)
    metric = observed(ROWS, COLS) if data else Metric(ROWS, COLS)
    exact = HTMatrix.from_dense(torch.randn(ROWS, COLS, generator=generator).double(), LAYOUTS[layout], rtol=0.3)
    noise = torch.randn(ROWS, COLS, generator=generator).double()
    for size in (1.0, 1e-1, 1e-2, 1e-3, 1e-5):
        target = WeightedMatrix.of(exact.dense() + size * noise, metric)
        zero = weighted_error(metric, target.matrix.dense())
        assert target.total == pytest.approx(zero, rel=1e-5 if large else 1e-9)
        expected = weighted_error(metric, size * noise)
        # Down to the rounding of the matrix itself.
        assert target.error_of(exact) == pytest.approx(expected, rel=2e-3 if large else 1e-5, abs=1e-13 * zero)
        factors = target.factors_of(exact)
        assert factors is None or factors[1].dtype is (torch.float32 if large == "factors" else torch.float64)

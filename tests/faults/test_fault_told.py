"""Faults of kinds 6 and 7: a report that counts or judges wrongly."""

from __future__ import annotations

import pytest
from small import tagger
from torch import nn

import htcompress
from htcompress.errors import TaskError


def test_6_multiplications_are_counted_as_they_run() -> None:
    made = htcompress.compress(nn.LSTM(256, 256), budget=12_000, layout="svd", scope="integrated")
    (direction,) = made.modules[""].directions().values()
    assert direction.joint is not None
    rank = direction.joint.rank or 0
    assert made.report.totals.macs_per_step_after == rank * (256 + 1024) + rank * (256 + 1024)


@pytest.mark.parametrize("name", ["mse", "loss", "val_loss", "error", "wer", "CER", "der", "eer", "ppl", "rmse", "mae"])
def test_7_the_direction_of_an_error_is_asked_for(name: str) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {name: 1.0}

    with pytest.raises(TaskError, match="higher_is_better = False"):
        htcompress.compress(tagger(), budget=300, evaluate=evaluate)
    made = htcompress.compress(tagger(), budget=300, evaluate=evaluate, higher_is_better=False)
    assert made.report.quality.higher_is_better is False


@pytest.mark.parametrize("name", ["accuracy", "f1", "metric", "accuracy_per_class", "bleu", "percent_right", "auc"])
def test_7_other_names_need_no_word(name: str) -> None:
    made = htcompress.compress(tagger(), budget=300, evaluate=lambda model: {name: 1.0})
    assert made.report.quality.higher_is_better is True

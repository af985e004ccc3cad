"""Answers against targets, with numbers that are counted by hand; what does not compare is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from htcompress.errors import TaskError
from htcompress.graphs.calibration import Calibration
from htcompress.graphs.feeds import ArrayFeeds, Feed, Value
from htcompress.graphs.graph import Answers
from htcompress.graphs.measuring import metrics_of


class Fixed:
    """A session that is asked only for the names of its outputs."""

    def __init__(self, shape: tuple[int | None, ...]) -> None:
        self.inputs: list[Value] = []
        self.passed: Mapping[str, str] = {}
        self.outputs = [Value("y", shape, "tensor(float)")]

    def answers(self, calls: list[Feed], states: Mapping[str, str]) -> Answers:
        raise NotImplementedError


def measured(found: np.ndarray, targets: np.ndarray, metric: str, calls: int = 1) -> float:
    """Of answers to one batch, or to several calls that are its axis 0."""
    arrays = {"x": np.zeros((len(targets), calls, 3), np.float32)}
    inputs = {"x": Value("x", (None, 3), "tensor(float)")}
    feeds = ArrayFeeds("x.npz", inputs, {}, len(targets), calls > 1, arrays, {}, wanted=targets)
    answers = [[{"y": one} for one in (found if calls > 1 else [found])]]
    return metrics_of(Calibration(Path(), "wanted", metric), answers, feeds, Fixed(found.shape))[metric]


SCORES = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]], np.float32)
CASES = {
    "classes": (SCORES, np.array([0, 1, 1, 0]), 0.75),
    "classes, an axis more": (SCORES, np.array([[0], [1], [1], [0]]), 0.75),
    "one of each row": (SCORES, np.array([[1, 0], [0, 1], [0, 1], [1, 0]]), 0.75),
    "several of each row": (SCORES, np.array([[1, 1], [0, 1], [1, 0], [1, 1]]), 0.75),
    "probabilities": (SCORES[:, :1], np.array([1, 0, 0, 1]), 0.75),
    "probabilities, no axis": (SCORES[:, 0], np.array([[True], [False], [False], [True]]), 0.75),
}


@pytest.mark.parametrize("case", CASES)
def test_accuracy(case: str) -> None:
    found, targets, right = CASES[case]
    assert measured(found, targets, "accuracy") == right


def test_shapes_never_spread() -> None:
    """A column beside a row is no table of all differences."""
    found, targets = np.array([[1.0], [2], [4]]), np.array([1.0, 2, 2])
    assert measured(found, targets, "mse") == pytest.approx(4 / 3)
    assert measured(found, targets, "mae") == pytest.approx(2 / 3)


def test_every_call_or_the_last() -> None:
    found = np.array([[[0.0], [1]], [[2], [3]], [[4], [5]]])  # calls, samples, 1
    assert measured(found, np.array([4.0, 7]), "mae", 3) == 1
    assert measured(found, np.array([[0.0, 2, 4], [1, 3, 8]]), "mae", 3) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("found", "targets", "metric", "said"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), "mse", "not of one size"),
        (np.zeros((4, 6)), np.zeros((4, 3)), "accuracy", "not of one size"),
        (np.full((4, 1), 1.5), np.zeros(4), "accuracy", "probabilities between 0 and 1"),
    ],
)
def test_what_does_not_compare(found: np.ndarray, targets: np.ndarray, metric: str, said: str) -> None:
    with pytest.raises(TaskError, match=said) as caught:
        measured(found, targets, metric)
    assert f"do not compare by {metric}" in str(caught.value)

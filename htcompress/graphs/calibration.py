"""What a graph is calibrated and measured on, as the user names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from htcompress.errors import RequestError

if TYPE_CHECKING:
    import numpy as np


def _accuracy(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.size == wanted.size:
        wanted = _alike(wanted, found)
        if found.shape[-1] > 1 and (wanted.astype(bool).sum(-1) == 1).all():
            return float((found.argmax(-1) == wanted.argmax(-1)).mean())
        if not (found.min() >= 0 and found.max() <= 1):
            raise ValueError("one number stands for each answer, and not all are probabilities between 0 and 1")
        return float(((found > 0.5) == wanted).mean())
    classes = found.argmax(-1)
    return float((classes == _alike(wanted, classes)).mean())


def _squared(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found.astype(float) - _alike(wanted, found)) ** 2).mean())


def _absolute(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(abs(found.astype(float) - _alike(wanted, found)).mean())


def _alike(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The targets in the shape of the answers, which may have axes of one more or less. Raises `ValueError`."""
    if [n for n in wanted.shape if n > 1] != [n for n in found.shape if n > 1]:
        raise ValueError(f"{found.shape} and {wanted.shape} are not of one size")
    return wanted.reshape(found.shape)


METRICS: Mapping[str, tuple[Callable[[np.ndarray, np.ndarray], float], bool]] = {
    "accuracy": (_accuracy, True),
    "mse": (_squared, False),
    "mae": (_absolute, False),
}
"""What `--metric` names: of the first output and the targets, and whether higher is better."""


@dataclass(frozen=True)
class Calibration:
    """What a graph is run on.

    Attributes:
        file: an `.npz` file with an array for each input, the first axis the samples.
        targets: the name of an array of it to measure against.
        metric: what is measured, one of `METRICS`; by default accuracy.
    """

    file: Path | None = None
    targets: str | None = None
    metric: str | None = None

    def check(self) -> None:
        """Raise `RequestError` where it makes no sense."""
        if self.metric is not None and self.metric not in METRICS:
            raise RequestError(f"--metric is one of {', '.join(METRICS)}; found {self.metric!r}.")
        if self.metric is not None and self.targets is None:
            raise RequestError("--metric needs --targets NAME, an array of the calibration file to measure against.")
        if self.targets is not None and self.file is None:
            raise RequestError("--targets needs --calibration X.npz, the file that the array is in.")

    @property
    def headline(self) -> str:
        """The metric where there are targets."""
        return self.metric or "accuracy"

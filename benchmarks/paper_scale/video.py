"""A task at paper scale: frames of 120 x 160 x 3 into an LSTM of 256, 59.2 million RNN parameters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from clips import Classifier, Clips, accuracy
from torch import Tensor, nn
from torch.nn import functional as F

CLIPS = Clips(height=120, width=160, channels=3, noise=0.1, seed=11)
HIDDEN = 256
CALIBRATION_CLIPS, TRAINING_CLIPS, EVALUATION_CLIPS, BATCH = 512, 1024, 1000, 32

higher_is_better = True
_epochs = count()


def model() -> nn.Module:
    """A fresh dense model."""
    return Classifier(CLIPS.height * CLIPS.width * CLIPS.channels, HIDDEN)


def calibration() -> Iterator[Tensor]:
    """512 clips, the same at every call."""
    for clips, _ in CLIPS.batches("calibration", CALIBRATION_CLIPS, BATCH):
        yield clips


def training() -> Iterator[tuple[Tensor, Tensor]]:
    """1,024 new clips at every call."""
    return CLIPS.batches("training", TRAINING_CLIPS, BATCH, next(_epochs))


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of the directions."""
    return F.cross_entropy(output, target)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Accuracy on 1,000 fixed clips of digits that are seen nowhere else."""
    return {"accuracy": accuracy(model, CLIPS.batches("evaluation", EVALUATION_CLIPS, BATCH))}

"""Tell which of nine speakers says /ae/, from series of different lengths (UCI Japanese Vowels).

Each step of a series is twelve LPC cepstrum coefficients, each series has 7 to 29 steps. Series of a batch
are packed, so that the bidirectional GRU sees no padding.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

FEATURES = 12
HIDDEN = 64
LAYERS = 2
SPEAKERS = 9

BATCH = 30
JITTER = 0.3
"""Standard deviation of the noise added to training series, in units of each coefficient's own."""

VOWELS_FILE = Path(__file__).parent / "vowels.npz"

_TRAINING_SEED = np.random.SeedSequence(19_990_701)

higher_is_better = True


class SpeakerClassifier(nn.Module):
    """Classify a series by the mean over time of a bidirectional GRU's output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(FEATURES, HIDDEN, num_layers=LAYERS, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, SPEAKERS)

    def forward(self, series: PackedSequence) -> Tensor:
        """Map packed series of 12 coefficients to logits (batch, 9)."""
        packed, _ = self.rnn(series)
        states, lengths = pad_packed_sequence(packed, batch_first=True)
        # Padding is zero and adds nothing to the sum.
        return self.head(states.sum(dim=1) / lengths.to(states.device).unsqueeze(1))


def model() -> SpeakerClassifier:
    """Return a freshly initialised dense model."""
    return SpeakerClassifier()


def calibration() -> Iterator[PackedSequence]:
    """Yield the 270 training series in packed batches of 30; the same ones at every call."""
    series, _ = load_split("train")
    # Every ninth series: the file is ordered by speaker, a batch should hold them all.
    for start in range(SPEAKERS):
        yield pack_sequence(series[start::SPEAKERS], enforce_sorted=False)


def training() -> Iterator[tuple[PackedSequence, Tensor]]:
    """Return one epoch of the training series, shuffled and with noise, as batches of (series, speakers).

    Every call draws anew; the sequence of calls in a fresh process always gives the same data.
    """
    return augmented_batches(_TRAINING_SEED.spawn(1)[0])


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (batch, 9) against speakers (batch,)."""
    return functional.cross_entropy(output, target)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the accuracy on the 370 test series."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    series, speakers = load_split("test")
    logits = model(pack_sequence(series, enforce_sorted=False).to(device))
    model.train(was_training)
    return {"accuracy": int((logits.argmax(dim=1).cpu() == speakers).sum()) / len(speakers)}


def augmented_batches(seed: int | np.random.SeedSequence) -> Iterator[tuple[PackedSequence, Tensor]]:
    """Yield the training series once, shuffled and with noise, as batches of (series, speakers)."""
    rng = np.random.default_rng(seed)
    series, speakers = load_split("train")
    order = rng.permutation(len(series))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        noisy = [
            series[index] + JITTER * torch.from_numpy(rng.standard_normal(series[index].shape, dtype=np.float32))
            for index in chosen
        ]
        yield pack_sequence(noisy, enforce_sorted=False), speakers[chosen]


def load_split(split: str) -> tuple[list[Tensor], Tensor]:
    """Return the series (steps, 12) and speakers (series,) of ``"train"`` or ``"test"``.

    Coefficients are standardised by the mean and the deviation of the training series.
    """
    with np.load(VOWELS_FILE) as file:
        reference = file["train_steps"]
        steps = (file[f"{split}_steps"] - reference.mean(axis=0)) / reference.std(axis=0)
        lengths, speakers = file[f"{split}_lengths"], file[f"{split}_speakers"]
    series = torch.from_numpy(steps).split(lengths.tolist())
    return list(series), torch.from_numpy(speakers.astype(np.int64))

"""Tell the direction in which a handwritten digit moves, from six raw RGB frames.

A clip shows one digit of random size, colour and speed moving in one of eight directions over a noisy
background. Its frames, flattened in height x width x channel order, go straight into an LSTM: 3,600 numbers
per step. Clips are rendered on the fly from ``digits.npz``; every source of randomness is seeded.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

HEIGHT, WIDTH, CHANNELS, STEPS = 30, 40, 3, 6
FEATURES = HEIGHT * WIDTH * CHANNELS
HIDDEN = 64
DIRECTIONS = 8
"""Class 0 moves right, the others follow counter-clockwise in steps of 45 degrees."""

BATCH = 64
CALIBRATION_CLIPS = 512
TRAINING_CLIPS = 2048
EVALUATION_CLIPS = 1600

DIGITS_FILE = Path(__file__).parent / "digits.npz"
HELD_OUT_DIGITS = 500
"""The last digits of the file appear in evaluation clips only."""

DIGIT_PIXELS = (12.0, 16.0)
SPEED = (1.0, 3.0)
"""Pixels per frame."""
MARGIN = 5.0
"""Least distance, in pixels, between the middle of a path and the edge of the frame."""
BACKGROUND = (0.0, 0.1)
CONTRAST = (0.3, 0.8)
"""Drawn for each colour channel of a clip; background plus contrast is the digit's colour."""
NOISE = 0.28
"""Standard deviation of the additive Gaussian noise of every colour value."""

# Distinct children of one root: the streams cannot overlap, whatever their lengths.
_CALIBRATION_SEED, _TRAINING_SEED, _EVALUATION_SEED = np.random.SeedSequence(20_240_601).spawn(3)

higher_is_better = True


class DirectionClassifier(nn.Module):
    """Classify a clip by the hidden state of an LSTM after its last frame."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, DIRECTIONS)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (batch, 6, 3600) to logits (batch, 8)."""
        states, _ = self.rnn(clips)
        return self.head(states[:, -1])


def model() -> DirectionClassifier:
    """Return a freshly initialised dense model."""
    return DirectionClassifier()


def calibration() -> Iterator[Tensor]:
    """Yield 512 clips of training digits, in batches (64, 6, 3600); the same ones at every call."""
    for clips, _ in batches(_CALIBRATION_SEED, training_digits(), CALIBRATION_CLIPS):
        yield clips


def training() -> Iterator[tuple[Tensor, Tensor]]:
    """Return one epoch of 2,048 clips as batches of (clips, directions).

    Every call renders new clips; the sequence of calls in a fresh process always gives the same data.
    """
    return batches(_TRAINING_SEED.spawn(1)[0], training_digits(), TRAINING_CLIPS)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (batch, 8) against directions (batch,)."""
    return functional.cross_entropy(output, target)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the accuracy on 1,600 fixed clips of held-out digits."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct = 0
    for clips, directions in batches(_EVALUATION_SEED, evaluation_digits(), EVALUATION_CLIPS):
        correct += int((model(clips.to(device)).argmax(dim=1).cpu() == directions).sum())
    model.train(was_training)
    return {"accuracy": correct / EVALUATION_CLIPS}


def training_digits() -> np.ndarray:
    """Return the digits (n, 8, 8), scaled to 0..1, for calibration and training."""
    return _digits()[:-HELD_OUT_DIGITS]


def evaluation_digits() -> np.ndarray:
    """Return the held-out digits (500, 8, 8), scaled to 0..1."""
    return _digits()[-HELD_OUT_DIGITS:]


def batches(
    seed: int | np.random.SeedSequence, digits: np.ndarray, count: int, batch: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``count`` clips of ``digits`` as batches of (clips, directions)."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, batch):
        yield render(rng, digits, min(batch, count - start))


def render(rng: np.random.Generator, digits: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Render clips (count, 6, 3600), float32 in 0..1, and draw their directions (count,)."""
    directions = rng.integers(DIRECTIONS, size=count)
    shapes = digits[rng.integers(len(digits), size=count)]
    pixels = rng.uniform(*DIGIT_PIXELS, size=count)
    speeds = rng.uniform(*SPEED, size=count)
    angles = directions * (2 * np.pi / DIRECTIONS)
    # The middle of the path, not its start, is drawn: digits of every direction stay in sight equally well.
    times = np.arange(STEPS) - (STEPS - 1) / 2
    travel = speeds[:, None] * times
    ys = rng.uniform(MARGIN, HEIGHT - MARGIN, size=(count, 1)) - np.sin(angles)[:, None] * travel
    xs = rng.uniform(MARGIN, WIDTH - MARGIN, size=(count, 1)) + np.cos(angles)[:, None] * travel
    rows = _resampling(ys, pixels, HEIGHT, digits.shape[1])
    columns = _resampling(xs, pixels, WIDTH, digits.shape[2])
    masks = rows @ shapes[:, None] @ columns.transpose(0, 1, 3, 2)

    background = rng.uniform(*BACKGROUND, size=(count, 1, 1, 1, CHANNELS)).astype(np.float32)
    contrast = rng.uniform(*CONTRAST, size=(count, 1, 1, 1, CHANNELS)).astype(np.float32)
    clips = rng.standard_normal((count, STEPS, HEIGHT, WIDTH, CHANNELS), dtype=np.float32)
    clips *= NOISE
    # Channel by channel: broadcasting over a last axis of three is several times as slow.
    for channel in range(CHANNELS):
        clips[..., channel] += background[..., channel]
        clips[..., channel] += masks * contrast[..., channel]
    np.clip(clips, 0.0, 1.0, out=clips)
    return torch.from_numpy(clips.reshape(count, STEPS, FEATURES)), torch.from_numpy(directions)


def _resampling(centres: np.ndarray, pixels: np.ndarray, size: int, source: int) -> np.ndarray:
    """Return matrices (count, steps, size, source) for bilinear enlargement at sub-pixel positions.

    Each takes one axis of an image of ``source`` pixels to ``pixels`` pixels around a centre (count, steps)
    of a frame axis of ``size`` pixels; what lies outside of the image is zero.
    """
    scale = (pixels / source)[:, None, None]
    places = (np.arange(size) + 0.5 - centres[:, :, None]) / scale + source / 2 - 0.5
    return np.maximum(0.0, 1.0 - np.abs(places[..., None] - np.arange(source))).astype(np.float32)


def _digits() -> np.ndarray:
    """Load the digits (1797, 8, 8) as float32 in 0..1."""
    with np.load(DIGITS_FILE) as file:
        return file["images"].astype(np.float32) / 16.0

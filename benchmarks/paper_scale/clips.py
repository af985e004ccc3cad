"""Clips of a handwritten digit that moves in one of eight directions, at the sizes of the papers' experiments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIGITS = Path(__file__).parents[2] / "sample_models" / "moving_digits" / "digits.npz"
HELD_OUT_DIGITS = 500
DIRECTIONS, STEPS = 8, 6


@dataclass(frozen=True)
class Clips:
    """How to render clips (count, 6, height * width * channels), with values around 0..1.

    A digit of `0.3` to `0.45` of the height moves `0.03` to `0.1` of it per frame; `noise` is Gaussian, per value.
    """

    height: int
    width: int
    channels: int
    noise: float
    seed: int

    def batches(self, purpose: str, count: int, batch: int, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (clips, directions); purposes draw from streams apart, evaluation from digits apart."""
        with np.load(DIGITS) as file:
            digits = torch.from_numpy(file["images"].astype(np.float32) / 16.0)
        digits = digits[-HELD_OUT_DIGITS:] if purpose == "evaluation" else digits[:-HELD_OUT_DIGITS]
        stream = ("calibration", "training", "evaluation").index(purpose)
        seed = np.random.SeedSequence((self.seed, stream, epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        for start in range(0, count, batch):
            yield self.render(digits, min(batch, count - start), generator)

    def render(self, digits: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw clips and their directions."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=generator)

        directions = torch.randint(DIRECTIONS, (count,), generator=generator)
        chosen = digits[torch.randint(len(digits), (count,), generator=generator)]
        size = self.height * uniform(0.3, 0.45, count)
        speed = self.height * uniform(0.03, 0.1, count)
        angle = directions * (2 * torch.pi / DIRECTIONS)
        time = torch.arange(STEPS) - (STEPS - 1) / 2
        y = self.height * uniform(0.25, 0.75, count, 1) - (angle.sin() * speed)[:, None] * time
        x = self.width * uniform(0.25, 0.75, count, 1) + (angle.cos() * speed)[:, None] * time
        # A sampling grid in the digit's own coordinates, -1 to 1 across it; what lies outside is black.
        rows = (torch.arange(self.height) + 0.5 - y[..., None]) / (size[:, None, None] / 2)
        cols = (torch.arange(self.width) + 0.5 - x[..., None]) / (size[:, None, None] / 2)
        grid = torch.stack(
            [
                cols[:, :, None, :].expand(-1, -1, self.height, -1),
                rows[..., None].expand(-1, -1, -1, self.width),
            ],
            dim=-1,
        ).flatten(0, 1)
        images = chosen[:, None, None].expand(-1, STEPS, -1, -1, -1).flatten(0, 1)
        masks = F.grid_sample(images, grid, align_corners=False)
        masks = masks.reshape(count, STEPS, self.height, self.width, 1)
        background = uniform(0.0, 0.1, count, 1, 1, 1, self.channels)
        contrast = uniform(0.4, 0.9, count, 1, 1, 1, self.channels)
        clips = masks * contrast + background
        clips += self.noise * torch.randn(clips.shape, generator=generator)
        return clips.reshape(count, STEPS, -1), directions


class Classifier(nn.Module):
    """An LSTM reads the flattened frames; its last state tells the direction."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, DIRECTIONS)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (batch, 8) of clips (batch, 6, features)."""
        states, _ = self.rnn(clips)
        return self.head(states[:, -1])


class ClipTask:
    """What a task file defines, for clips of one size into an LSTM of `hidden` units."""

    CALIBRATION_CLIPS, TRAINING_CLIPS, EVALUATION_CLIPS, BATCH = 512, 1024, 1000, 32

    def __init__(self, clips: Clips, hidden: int) -> None:
        self.clips, self.hidden = clips, hidden
        self._epochs = count()

    def model(self) -> nn.Module:
        """A fresh dense model."""
        return Classifier(self.clips.height * self.clips.width * self.clips.channels, self.hidden)

    def calibration(self) -> Iterator[Tensor]:
        """512 clips, the same at every call."""
        for clips, _ in self.clips.batches("calibration", self.CALIBRATION_CLIPS, self.BATCH):
            yield clips

    def training(self) -> Iterator[tuple[Tensor, Tensor]]:
        """1,024 new clips at every call."""
        return self.clips.batches("training", self.TRAINING_CLIPS, self.BATCH, next(self._epochs))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the directions."""
        return F.cross_entropy(output, target)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on 1,000 fixed clips of digits that are seen nowhere else."""
        device = next(model.parameters()).device
        right = 0
        for clips, directions in self.clips.batches("evaluation", self.EVALUATION_CLIPS, self.BATCH):
            right += int((model(clips.to(device)).argmax(1).cpu() == directions).sum())
        return {"accuracy": right / self.EVALUATION_CLIPS}

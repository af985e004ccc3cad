"""Train the moving-digits model from scratch and write ``model.pt``."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from task import DIGITS_FILE, batches, evaluate, loss, model, training_digits
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

EPOCH_CLIPS = 4096
BATCH = 64


def refresh_digits() -> None:
    """Rebuild ``digits.npz`` from scikit-learn's copy of the data."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez_compressed(DIGITS_FILE, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))


def train(epochs: int, learning_rate: float, weight_decay: float, seed: int) -> torch.nn.Module:
    """Return a model trained on freshly rendered clips, ``EPOCH_CLIPS`` per epoch."""
    torch.manual_seed(seed)
    net = model()
    optimizer = AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * (EPOCH_CLIPS // BATCH)
    schedule = OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    digits = training_digits()
    for epoch, epoch_seed in enumerate(np.random.SeedSequence(seed).spawn(epochs), start=1):
        started, total = time.perf_counter(), 0.0
        for clips, directions in batches(epoch_seed, digits, EPOCH_CLIPS, BATCH):
            value = loss(net(clips), directions)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += value.item() * len(clips)
        print(
            f"epoch {epoch:3d}  loss {total / EPOCH_CLIPS:.4f}  {time.perf_counter() - started:.1f} s",
            flush=True,
        )
    return net


def main() -> None:
    """Train, save and evaluate as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model.pt")
    parser.add_argument("--refresh-digits", action="store_true", help="only rebuild digits.npz (needs scikit-learn)")
    args = parser.parse_args()
    if args.refresh_digits:
        refresh_digits()
        return
    torch.set_num_threads(args.threads)
    net = train(args.epochs, args.learning_rate, args.weight_decay, args.seed)
    torch.save(net.state_dict(), args.output)
    print(f"accuracy {evaluate(net)['accuracy']:.4f}")


if __name__ == "__main__":
    main()

"""Train the Japanese Vowels model from scratch and write ``model.pt``."""

import argparse
from pathlib import Path

import numpy as np
import torch
from task import VOWELS_FILE, augmented_batches, evaluate, loss, model
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR


def refresh_vowels(folder: Path) -> None:
    """Rebuild ``vowels.npz`` from the files ``JapaneseVowels_{TRAIN,TEST}.ts`` of ``folder``."""
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        _, data = (folder / f"JapaneseVowels_{split.upper()}.ts").read_text().split("@data\n")
        series, speakers = [], []
        for line in data.splitlines():
            *coefficients, speaker = line.split(":")
            series.append(np.array([row.split(",") for row in coefficients], dtype=np.float32).T)
            speakers.append(int(speaker) - 1)
        arrays[f"{split}_steps"] = np.concatenate(series)
        arrays[f"{split}_lengths"] = np.array([len(steps) for steps in series], dtype=np.uint8)
        arrays[f"{split}_speakers"] = np.array(speakers, dtype=np.uint8)
    np.savez_compressed(VOWELS_FILE, **arrays)


def train(epochs: int, learning_rate: float, weight_decay: float, seed: int) -> torch.nn.Module:
    """Return a model trained on the 270 training series."""
    torch.manual_seed(seed)
    net = model()
    optimizer = AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = CosineAnnealingLR(optimizer, epochs)
    for epoch, epoch_seed in enumerate(np.random.SeedSequence(seed).spawn(epochs), start=1):
        values = []
        for series, speakers in augmented_batches(epoch_seed):
            value = loss(net(series), speakers)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            values.append(value.item())
        schedule.step()
        if epoch % 10 == 0:
            print(f"epoch {epoch:3d}  loss {np.mean(values):.4f}", flush=True)
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
    parser.add_argument("--refresh-vowels", type=Path, metavar="FOLDER", help="only rebuild vowels.npz from .ts files")
    args = parser.parse_args()
    if args.refresh_vowels is not None:
        refresh_vowels(args.refresh_vowels)
        return
    torch.set_num_threads(args.threads)
    net = train(args.epochs, args.learning_rate, args.weight_decay, args.seed)
    torch.save(net.state_dict(), args.output)
    print(f"accuracy {evaluate(net)['accuracy']:.4f}")


if __name__ == "__main__":
    main()

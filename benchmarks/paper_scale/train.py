"""Train the dense models of the paper-scale cases; each takes minutes and lands in `benchmarks/.cache`.

python benchmarks/paper_scale/train.py video gray
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from htcompress.task import load_task

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache" / "paper_scale"
STEPS = {"video": 480, "gray": 480}
LEARNING_RATE = {"video": 2e-4, "gray": 3e-4}


def train(name: str, steps: int, seed: int) -> None:
    """Train one model with Adam and keep its state_dict."""
    torch.manual_seed(seed)
    task = load_task(HERE / f"{name}.py")
    model = task.model()
    assert task.loss is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE[name])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE[name], total_steps=steps, pct_start=0.1)
    done, began = 0, time.perf_counter()
    while done < steps:
        for clips, target in task.training():
            loss = task.loss(model(clips), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done % 20 == 0:
                print(f"{name}: step {done}, loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
            if done == steps:
                break
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), CACHE / f"{name}.pt")
    parameters = sum(p.numel() for p in model.rnn.parameters())  # type: ignore[union-attr]
    print(f"{name}: {parameters:,} RNN parameters, {task.evaluate(model.eval())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(STEPS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # oneDNN's LSTM takes three to six times as long with 57,600 inputs.
    with torch.backends.mkldnn.flags(enabled=False):
        for name in options.names:
            train(name, options.steps or STEPS[name], options.seed)


if __name__ == "__main__":
    main()

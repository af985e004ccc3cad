"""onnxruntime on the compressed and the dense sample, both exported, beside torch; medians of interleaved rounds.

    htcompress convert sample_models/moving_digits/model.pt --budget 5000 \\
        --task sample_models/moving_digits/task.py -o moving_digits-ht
    python benchmarks/speed/onnx_latency.py moving_digits-ht > benchmarks/results/onnx.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import medians

import htcompress
from htcompress.exporting.model import whole_model
from htcompress.exporting.verify import session
from htcompress.observer import Observer
from htcompress.task import load_task

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "sample_models" / "moving_digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="the sample, converted")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task(SAMPLE / "task.py")
    dense = task.model().eval()
    dense.load_state_dict(torch.load(SAMPLE / "model.pt", weights_only=True))
    models = {"dense": dense, "compressed": htcompress.load(options.directory, task.model()).eval()}
    files = {name: whole_model(model, task, Observer())[0] for name, model in models.items()}
    runtimes = {name: session(data) for name, data in files.items()}
    (clips,) = next(task.calibration())
    print("moving_digits, clips of 6 frames, 1 thread; medians of interleaved rounds, milliseconds a call\n")
    columns = ("batch", "onnx dense", "onnx compressed", "times", "torch dense", "torch compressed")
    print("".join(f"{column:>18}" for column in columns))
    for batch in (1, 16, 64):
        x = clips[:batch]
        calls: dict[str, Callable[[], Any]] = {}
        for name, runtime in runtimes.items():
            given = {runtime.get_inputs()[0].name: x.numpy()}
            calls[f"onnx {name}"] = lambda runtime=runtime, given=given: runtime.run(None, given)
        for name, model in models.items():
            calls[f"torch {name}"] = torch.no_grad()(lambda model=model, x=x: model(x))
        ms = {name: 1000 * seconds for name, seconds in medians(calls, options.rounds).items()}
        times = ms["onnx dense"] / ms["onnx compressed"]
        shown = (f"{ms[c]:.3f}" if c in ms else f"{times:.1f}x" for c in columns[1:])
        print(f"{batch:>18}" + "".join(f"{text:>18}" for text in shown), flush=True)
    print(f"\nfiles: dense {len(files['dense']):,} bytes, compressed {len(files['compressed']):,} bytes")


if __name__ == "__main__":
    sys.exit(main())

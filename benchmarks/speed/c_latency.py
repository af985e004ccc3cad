"""Steps per second of a compressed layer in C, beside torch and onnxruntime, one sequence at a time, one thread.

    cd sample_models/moving_digits; htcompress convert model.pt --budget 4kB --task task.py -o md
    python benchmarks/speed/c_latency.py md

The layer steps through a sequence of 200 steps; medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch

import htcompress
from htcompress.directory.read import read_modules, read_state
from htcompress.exporting.layer import layer_model

STEPS, ROUNDS = 200, 7
MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include "rnn.h"
static float x[STEPS * RNN_INPUTS], out[STEPS * RNN_OUTPUTS], h[RNN_STATE], c[RNN_STATE];
static float work[RNN_WORK(STEPS)], buffer[RNN_NUMBERS];
int main(int n, char **v) {
    struct timespec a, b;
    (void)v;
    for (int i = 0; i < STEPS * RNN_INPUTS; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    if (n > 1) rnn_decode(buffer);
    clock_gettime(CLOCK_MONOTONIC, &a);
    rnn_sequence(x, STEPS, h, c, out, work);
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("%.9f\\n", (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
    return 0;
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    place = parser.parse_args().directory
    torch.set_num_threads(1)
    ((_, module),) = read_modules(place, read_state(place))
    module = module.float().eval()
    s = module.settings
    model, _ = layer_model(module, "")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    dense = s.recurrence.torch_layer(s.input_size, s.hidden_size, s.num_layers, bidirectional=s.bidirectional).eval()
    x = torch.rand(STEPS, 1, s.input_size) - 0.5
    state = np.zeros((s.num_layers * s.num_directions, 1, s.hidden_size), np.float32)
    own = x.transpose(0, 1) if s.batch_first else x
    feeds = {"input": own.numpy()} | {f"{n}_0": state for n in "hc"[: s.recurrence.states]}

    def timed(run: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter()
            with torch.no_grad():
                run()
            return time.perf_counter() - began

        return once

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        htcompress.export(place, folder, to="c")
        (folder / "main.c").write_text(MAIN)
        flags = ["-std=gnu99", "-O2", f"-DSTEPS={STEPS}"]
        subprocess.run(["gcc", *flags, "rnn.c", "main.c", "-lm", "-o", "timed"], cwd=folder, check=True)

        def in_c(*arguments: str) -> Callable[[], float]:
            command = [str(folder / "timed"), *arguments]
            return lambda: float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

        ways = {
            "C, decoded where used": in_c(),
            "C, decoded once": in_c("once"),
            "torch": timed(lambda: module(own)),
            "onnxruntime": timed(lambda: session.run(None, feeds)),
            "torch, dense": timed(lambda: dense(x)),
        }
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, run in ways.items():
                spent[way].append(run())
    for way, seconds in spent.items():
        print(f"{way:24} {STEPS / median(seconds):12,.0f} steps a second")


if __name__ == "__main__":
    main()

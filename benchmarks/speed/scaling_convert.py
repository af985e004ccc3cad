"""Time and memory of converting a checkpoint from its weights alone, against the numbers in it.

    python benchmarks/speed/scaling_convert.py > benchmarks/results/scaling_convert.txt
    python benchmarks/speed/scaling_convert.py 1M 64M --budget 80kB
    python benchmarks/speed/scaling_convert.py 64M --layers 3      # several matrices of that size each

A checkpoint holds LSTMs of 256 units whose inputs are so many that W_ih has about the numbers asked for: eight
Kronecker terms with weights 0.7^k, and noise of a tenth. It is written a few rows at a time.

Each conversion is a process of its own, whose memory is looked at every few milliseconds. *Extra* is the most anonymous
memory (RssAnon) that it held beyond what a process holds that has only imported htcompress and torch. Pages of the
mapped checkpoint (RssFile) are apart: the system takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HIDDEN, TERMS, NOISE = 256, 8, 0.1
ROWS = 4 * HIDDEN
INPUTS = {
    "1M": (10, 10, 10),
    "4M": (16, 16, 16),
    "16M": (20, 25, 32),
    "64M": (40, 40, 40),
    "256M": (50, 50, 100),
    "512M": (50, 100, 100),
}
"""By the numbers of a matrix: the modes of its inputs."""

WRITTEN = 1 << 22
"""Numbers that are made up at a time."""

LOOKED_S = 0.005


@dataclass
class Used:
    """What a process took: seconds, megabytes of anonymous memory and of files' pages at their most."""

    seconds: float
    anonymous: float
    of_files: float


def written(file: Path, size: str, layers: int) -> int:
    """Write a checkpoint, and say how many numbers it holds."""
    modes = INPUTS[size]
    cols = modes[0] * modes[1] * modes[2]
    state: dict[str, torch.Tensor] = {}
    raws = []
    for layer in range(layers):
        generator = torch.Generator().manual_seed(layer)
        raw = file.with_name(f"{file.name}.{layer}")
        raws.append(raw)
        wide = torch.from_file(str(raw), shared=True, size=ROWS * cols, dtype=torch.float32).view(ROWS, cols)
        fill(wide, modes, generator)
        name = f"rnn{layer}" if layers > 1 else "rnn"
        own = {
            "weight_ih_l0": wide,
            "weight_hh_l0": torch.randn(ROWS, HIDDEN, generator=generator) / HIDDEN**0.5,
            "bias_ih_l0": torch.randn(ROWS, generator=generator) / 10,
            "bias_hh_l0": torch.randn(ROWS, generator=generator) / 10,
        }
        state |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    torch.save(state, file)
    for raw in raws:
        raw.unlink()
    return sum(tensor.numel() for tensor in state.values())


def fill(wide: torch.Tensor, modes: tuple[int, int, int], generator: torch.Generator) -> None:
    """Make up a matrix (rows, cols) in place, a few rows at a time."""
    rows, cols = wide.shape
    left, right = torch.randn(rows, TERMS, generator=generator), torch.empty(TERMS, cols)
    for k in range(TERMS):
        a, b, c = (torch.randn(n, generator=generator) for n in modes)
        right[k] = 0.7**k * torch.einsum("a,b,c->abc", a, b, c).reshape(-1)
    scale = cols**-0.5
    for part, own in zip(wide.split(max(1, WRITTEN // cols)), left.split(max(1, WRITTEN // cols)), strict=True):
        noise = torch.randn(part.shape, generator=generator)
        part.copy_(scale * torch.addmm(noise, own, right, beta=NOISE))


def run(command: list[str], threads: int, trace: Path | None = None) -> Used:
    """Run a command to its end, and look at its memory all the while."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, env=environment)
        anonymous = of_files = 0
        looks = []
        while process.poll() is None:
            now = memory(process.pid)
            anonymous, of_files = max(anonymous, now[0]), max(of_files, now[1])
            looks.append((time.perf_counter() - began, *now))
            time.sleep(LOOKED_S)
        seconds = time.perf_counter() - began
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read()}")
    if trace is not None:
        trace.write_text("".join(f"{t:.3f} {a / 1024:.0f} {f / 1024:.0f}\n" for t, a, f in looks))
    return Used(seconds, anonymous / 1024, of_files / 1024)


def memory(process: int) -> tuple[int, int]:
    """Anonymous memory and files' pages of a process, in KiB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return tuple(int(found.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", choices=[[], *INPUTS], default=list(INPUTS), metavar="SIZE")
    parser.add_argument("--budget", action="append", help="numbers or bytes (default: 20000, then 80kB)")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written and kept, to be used again")
    parser.add_argument("--trace", type=Path, help="a file for the memory of the last conversion over time")
    options = parser.parse_args()
    module = [sys.executable, "-m", "htcompress_cli"]
    base = run([sys.executable, "-c", "import htcompress, torch"], options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s); imports alone hold {base.anonymous:.0f} MB")
    print(f"{'numbers':>14}{'file':>10}  {'budget':>8}{'time':>10}{'extra memory':>15}{'of the file':>13}  file pages")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        for size in options.sizes:
            file = folder / f"{size}x{options.layers}.pt"
            if not file.exists():
                written(file, size, options.layers)
            megabytes = file.stat().st_size / 2**20
            for budget in options.budget or ["20000", "80kB"]:
                out = Path(scratch) / "out"
                command = [*module, "convert", str(file), "--budget", budget, "--no-finetune", "-o", str(out)]
                used = run(command, options.threads, options.trace)
                extra = used.anonymous - base.anonymous
                print(
                    f"{file.stat().st_size // 4:>14,}{megabytes:>7,.0f} MB  {budget:>8}{used.seconds:>8.1f} s"
                    f"{extra:>12,.0f} MB{extra / megabytes:>13.2f}{used.of_files:>9,.0f} MB",
                    flush=True,
                )
            if options.folder is None:
                file.unlink()


if __name__ == "__main__":
    main()

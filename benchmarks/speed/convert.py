"""The command line on a checkpoint of 59.2 million numbers: how long until help, inspection, conversion; memory.

    python benchmarks/paper_scale/train.py video --threads 1     # once: trains benchmarks/.cache/paper_scale/video.pt
    python benchmarks/speed/convert.py > benchmarks/results/convert.txt

Each command runs as a process of its own, as a user starts it. Peak memory is the largest resident set, of which
the pages of the mapped checkpoint are a part.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "benchmarks" / ".cache" / "paper_scale" / "video.pt"
TASK = ROOT / "benchmarks" / "paper_scale" / "video.py"
COMMAND = Path(sys.executable).parent / "htcompress"


def run(*arguments: str, threads: int = 1) -> tuple[float, float, str]:
    """Seconds, peak resident megabytes, and what was printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(COMMAND), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"htcompress {' '.join(arguments)} failed:\n{output}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the short commands")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not MODEL.exists():
        raise SystemExit(
            f"{MODEL.relative_to(ROOT)} is not there; train it with benchmarks/paper_scale/train.py video."
        )
    size = MODEL.stat().st_size / 2**20
    print(f"checkpoint of {size:.0f} MB; {options.threads} thread(s)")
    for name, arguments in (("--help", ["--help"]), ("inspect", ["inspect", str(MODEL)])):
        rounds = [run(*arguments, threads=options.threads) for _ in range(options.rounds)]
        seconds, memory = median(r[0] for r in rounds), max(r[1] for r in rounds)
        print(f"{name:24}{seconds:8.2f} s (median of {options.rounds}){memory:8.0f} MB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["convert", str(MODEL), "--budget", "8808", "--no-finetune", "--task", str(TASK)]
        seconds, memory, output = run(*arguments, "-o", str(Path(folder) / "out"), threads=options.threads)
        print(f"{'convert --no-finetune':24}{seconds:8.1f} s {memory:24.0f} MB, {memory / size:.1f} times the file")
        print("\n" + output)


if __name__ == "__main__":
    main()

"""Random architectures, many of them: what the suite does for 40 seeds.

    python benchmarks/robustness/architectures.py --seeds 500

Prints what came of them, and every seed at which something does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from architectures import examine


def main() -> int:
    """Examine the seeds; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    faults: dict[int, str] = {}
    began = time.perf_counter()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes[examine(seed, Path(folder) / "out")] += 1
            except Exception:
                faults[seed] = traceback.format_exc(limit=-3)
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome:32} {count:5}")
    print(f"{'faults':32} {len(faults):5}")
    print(f"{arguments.seeds} architectures from seed {arguments.first}, {time.perf_counter() - began:.0f} s")
    for seed, fault in faults.items():
        print(f"\nseed {seed}\n{fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

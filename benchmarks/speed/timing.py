"""Interleaved timing: every round runs each contestant, and the medians over the rounds are compared."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

LEAST_S = 0.03


def medians(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each contestant.

    In a round each runs once unmeasured, so that nobody pays for the caches that another has emptied, then often
    enough for a clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            began = time.perf_counter()
            call()
            once = time.perf_counter() - began
            if once > 1.0:  # caches are no matter
                seconds[name].append(once)
                continue
            count = max(1, int(LEAST_S / max(once, 1e-9)))
            began = time.perf_counter()
            for _ in range(count):
                call()
            seconds[name].append((time.perf_counter() - began) / count)
    return {name: median(values) for name, values in seconds.items()}


def peak_above(call: Callable[[], Any]) -> float:
    """The megabytes by which the peak of resident memory during a call exceeds what was resident before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A figure of this process in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)


def in_fresh_process(script: str, *arguments: str) -> Any:
    """What a script prints as JSON on its last line, run by itself: peak memory is of a whole process."""
    command = [sys.executable, script, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    return json.loads(output.strip().splitlines()[-1])

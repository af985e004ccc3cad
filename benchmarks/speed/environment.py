"""An environment of their own for the peers, in `benchmarks/.cache/peers`: made at the first run, then used."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLACE = HERE.parent / ".cache" / "peers"


def enter(threads: int) -> None:
    """Go on in the peers' environment, with so many threads; returns where the script runs in it already."""
    python = PLACE / "bin" / "python"
    settings = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    if Path(sys.prefix) == PLACE and all(os.environ.get(name) == value for name, value in settings.items()):
        return
    done = PLACE / ".installed"
    wanted = (HERE / "requirements.txt").read_text()
    if not done.exists() or done.read_text() != wanted:
        if not python.exists():
            venv.create(PLACE, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", str(HERE / "requirements.txt")], check=True)
        subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), "-e", str(ROOT)], check=True)
        done.write_text(wanted)
    os.execve(python, [str(python), *sys.argv], {**os.environ, **settings})

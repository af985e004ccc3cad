"""Calibration data for real files of Keras, as `convert --calibration` takes it.

    python benchmarks/real/keras_files.py domains OUT.npz
    python benchmarks/real/keras_files.py proteins OUT.npz

`domains`: for `dgaintel/domain_classifier_model.h5` of dgaintel 2.3, an LSTM 128 to 64 that tells drawn domain names
from real ones: half are words of Python's own modules and keywords put together, half are drawn letters; `drawn` says
which. `proteins`: for `bass-model1.h5` of asmscan-bilstm 1.0.0, a BiLSTM 8 to 8 and an LSTM 16 to 4: fragments of
proteins drawn with the frequencies of amino acids.

Of `OUT.npz` the first three quarters calibrate, the last is measured on.
"""

from __future__ import annotations

import keyword
import random
import sys

import numpy as np

COUNT = 640

LETTERS = "-.0123456789_abcdefghijklmnopqrstuvwxyz"
"""The alphabet of dgaintel, each letter by its place."""

LONGEST = 82
ENDS = ("com", "net", "org", "info", "biz", "de", "io")


def domains() -> dict[str, np.ndarray]:
    """Names of both kinds, in turns, and which are drawn."""
    draw = random.Random(0)
    words = sorted({w.lower() for w in (*keyword.kwlist, *sys.stdlib_module_names) if w.isalpha() and len(w) > 2})
    codes, drawn = np.zeros((COUNT, LONGEST), np.float32), np.zeros((COUNT, 1), np.float32)
    for k in range(COUNT):
        if k % 2:
            name = "".join(draw.choice(LETTERS[13:]) for _ in range(draw.randint(10, 24)))
        else:
            name = "".join(draw.choice(words) for _ in range(draw.randint(1, 3)))
        text = f"{name}.{draw.choice(ENDS)}"[:LONGEST]
        codes[k, : len(text)] = [LETTERS.index(letter) for letter in text]
        drawn[k] = k % 2
    return {"input": codes, "drawn": drawn}


FREQUENCIES = {
    "A": 8.25, "R": 5.53, "N": 4.06, "D": 5.46, "C": 1.38, "Q": 3.93, "E": 6.72, "G": 7.07, "H": 2.27, "I": 5.91,
    "L": 9.65, "K": 5.80, "M": 2.41, "F": 3.86, "P": 4.74, "S": 6.65, "T": 5.36, "W": 1.10, "Y": 2.92, "V": 6.86,
}  # fmt: skip
"""Amino acids in Swiss-Prot, in parts of a hundred."""

FRAGMENT = 40


def proteins() -> dict[str, np.ndarray]:
    """Fragments of amino acids, numbered from one in the order of their letters."""
    draw = np.random.default_rng(0)
    letters = sorted(FREQUENCIES)
    shares = np.array([FREQUENCIES[letter] for letter in letters])
    return {"input": 1.0 + draw.choice(len(letters), (COUNT, FRAGMENT), p=shares / shares.sum())}


def main() -> None:
    """Write the samples."""
    np.savez(sys.argv[2], **{"domains": domains, "proteins": proteins}[sys.argv[1]]())


if __name__ == "__main__":
    main()

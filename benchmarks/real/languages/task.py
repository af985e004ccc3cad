"""Languages of sentences: the BiLSTM of `LanguageIdentifier` 1.1.1 (MIT) on the translations in `django` 5.2.

Of each of 19 languages 50 sentences are for calibration and training, and 50 others for evaluation (drawn with seed 0).
Run `python benchmarks/real/fetched.py languages` first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CACHE = Path(__file__).parents[2] / ".cache" / "languages"
FOLDERS = {"no": "nb"}
"""Django's names of languages that have others in the model."""

EACH, LEAST, BATCH = 50, 30, 10
higher_is_better = True
_epochs = iter(range(1 << 30))


@cache
def words() -> tuple[dict[str, int], dict[str, int]]:
    """The numbers of characters and of languages."""
    found = torch.load(CACHE / "LanguageIdentifier" / "LID_mixed_model.pkl", map_location="cpu", weights_only=True)
    return found["char_to_idx"], found["lang_to_idx"]


class Languages(nn.Module):
    """Scores of the languages, summed over the characters of a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.char_embeddings = nn.Embedding(682, 150, padding_idx=0)
        self.lstm = nn.LSTM(150, 150, num_layers=2, bidirectional=True, batch_first=True)
        self.hidden2lang = nn.Linear(300, 20)

    def forward(self, characters: Tensor) -> Tensor:
        """(batch, 20) for characters (batch, length)."""
        return self.hidden2lang(self.lstm(self.char_embeddings(characters))[0]).sum(1)


@cache
def sentences() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sentences and their languages: those for calibration, and those for evaluation."""
    seen: list[tuple[str, str]] = []
    kept: list[tuple[str, str]] = []
    for language in sorted(words()[1]):
        folder = FOLDERS.get(language, language)
        found = set()
        for file in sorted((CACHE / "django").rglob(f"locale/{folder}/LC_MESSAGES/*.po")):
            found |= set(translations(file.read_text(encoding="utf-8")))
        chosen = sorted(s for s in found if len(s) >= LEAST and not re.search(r"[{}<>]", s))
        random.Random(0).shuffle(chosen)
        if len(chosen) >= 2 * EACH:
            seen += [(s, language) for s in chosen[:EACH]]
            kept += [(s, language) for s in chosen[EACH : 2 * EACH]]
    return seen, kept


def translations(text: str) -> Iterator[str]:
    """The translations of a `.po` file."""
    for found in re.finditer(r'^msgstr(?:\[\d\])? ((?:"[^\n]*"\n)+)', text, re.MULTILINE):
        joined = "".join(re.findall(r'"([^\n]*)"', found[1]))
        if "Content-Type" not in joined:
            yield joined.replace('\\"', '"').replace("\\n", " ").strip()


def characters(sentence: str) -> list[int]:
    """The numbers of a sentence's characters."""
    known = words()[0]
    return [known.get(c, len(known)) for c in sentence]


def batches(pairs: list[tuple[str, str]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Sentences of about the same length, cut to that of the shortest, for the model knows no padding."""
    ordered = sorted(pairs, key=lambda pair: len(pair[0]))
    groups = [ordered[k : k + BATCH] for k in range(0, len(ordered), BATCH)]
    random.Random(next(_epochs)).shuffle(groups)
    for group in groups:
        length = min(len(s) for s, _ in group)
        yield (
            torch.tensor([characters(s[:length]) for s, _ in group]),
            torch.tensor([words()[1][language] for _, language in group]),
        )


def model() -> nn.Module:
    """A fresh dense model."""
    return Languages()


def calibration() -> Iterator[tuple[Tensor]]:
    """The sentences that are not for evaluation."""
    for found, _ in batches(sentences()[0]):
        yield (found,)


def training() -> Iterator[tuple[tuple[Tensor], Tensor]]:
    """The same with their languages."""
    for found, wanted in batches(sentences()[0]):
        yield (found,), wanted


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of the languages."""
    return F.cross_entropy(output, target)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Sentences whose language is found."""
    kept = sentences()[1]
    right = sum(int(model(torch.tensor([characters(s)])).argmax()) == words()[1][language] for s, language in kept)
    return {"accuracy": right / len(kept)}

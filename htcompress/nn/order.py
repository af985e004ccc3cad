"""An order of hidden units in few numbers: the place of a permutation among all of its size, in words of 32 bits.

Rows of a weight matrix fold well where units that do alike stand next to each other. A compressed layer keeps the
order in which its matrices are stored, and turns what it computes of them back: nobody outside ever sees it.
"""

from __future__ import annotations

from functools import lru_cache
from math import factorial

import torch
from jaxtyping import Int, Int32
from torch import Tensor

_BITS = 32
"""Of a word: as many as a float32 number takes, so that words count as numbers."""


def words_of(size: int) -> int:
    """How many words so many bytes take.

    >>> words_of(24), words_of(25)
    (6, 7)
    """
    return -(-8 * size // _BITS)


@lru_cache(maxsize=64)
def order_words(units: int) -> int:
    """How many words an order of so many units takes: the bits of units!, rounded up.

    >>> order_words(64), order_words(2048)
    (10, 612)
    """
    return -(-(factorial(units) - 1).bit_length() // _BITS)


def encoded(order: Int[Tensor, " units"]) -> Int32[Tensor, " words"]:
    """The words of a permutation of 0 .. units - 1.

    >>> encoded(torch.tensor([2, 0, 1])).tolist()
    [4]
    """
    rank, left = 0, list(range(len(order)))
    for unit in order.tolist():
        rank = rank * len(left) + left.index(unit)
        left.remove(unit)
    count = order_words(len(order))
    words = [(rank >> (_BITS * k)) & (2**_BITS - 1) for k in range(count)]
    return torch.tensor([w - 2**_BITS if w >= 2 ** (_BITS - 1) else w for w in words], dtype=torch.int32, device="cpu")


def decoded(words: Int32[Tensor, " words"], units: int) -> Int[Tensor, " units"]:
    """The inverse of `encoded`. Raises `ValueError` where the words are no order of so many units.

    >>> decoded(encoded(torch.tensor([2, 0, 1])), 3).tolist()
    [2, 0, 1]
    """
    rank = sum((word % 2**_BITS) << (_BITS * k) for k, word in enumerate(words.tolist()))
    if len(words) != order_words(units) or rank >= factorial(units):
        raise ValueError(f"{len(words)} words are no order of {units} units")
    digits = []
    for size in range(1, units + 1):
        rank, digit = divmod(rank, size)
        digits.append(digit)
    left = list(range(units))
    return torch.tensor([left.pop(digit) for digit in reversed(digits)], dtype=torch.int64, device="cpu")

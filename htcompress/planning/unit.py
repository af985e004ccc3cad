"""What a goal counts: numbers or bytes."""

from __future__ import annotations

from dataclasses import dataclass

from htcompress.vocabulary import INTEGER_BITS, WIDEST


@dataclass(frozen=True)
class Unit:
    """What is counted.

    Attributes:
        bits: that numbers may be stored in. Where numbers count, these at most.
        width: of the model's own numbers, in bytes; None: numbers count, and not bytes.
    """

    bits: tuple[int, ...] = (WIDEST,)
    width: int | None = None

    def of(self, numbers: int, bits: int = WIDEST) -> int:
        """The size of so many numbers that are stored in so many bits, or as they are where they are no wider."""
        if self.width is None:
            return numbers
        return numbers * (self.width if bits == WIDEST else min(self.width, bits // 8))

    def of_words(self, words: int) -> int:
        """The size of so many words of 32 bits."""
        return words if self.width is None else 4 * words

    def asked(self, size: int) -> str:
        """A size as a budget of it is asked for."""
        return f"{size}" if self.width is None else f"{size}B"

    @property
    def codes(self) -> bool:
        """Whether numbers count and are codes, those of dense matrices, too."""
        return self.width is None and max(self.bits) in INTEGER_BITS

    def numbers(self, size: int) -> int:
        """As many numbers as can be of a size."""
        return size if self.width is None else size * 8 // min(self.bits)


NUMBERS = Unit()
"""Numbers count, stored as they are."""

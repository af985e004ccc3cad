"""The words that a user may choose from, and that reports and files are written in. They cost no torch."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from htcompress.errors import RequestError

AnyWord = TypeVar("AnyWord", bound=StrEnum)


class Kind(StrEnum):
    """The recurrences of torch: those of `torch.nn.LSTM`, `GRU`, and `RNN` with either nonlinearity."""

    LSTM = "lstm"
    GRU = "gru"
    RNN_TANH = "rnn_tanh"
    RNN_RELU = "rnn_relu"

    @property
    def module(self) -> str:
        """The name of torch's module that computes it."""
        return self.value.partition("_")[0].upper()


class Format(StrEnum):
    """How a matrix may be stored: in Hierarchical Tucker form, and what that is compared with; `dense` only rounds."""

    HT = "ht"
    TT = "tt"
    TR = "tr"
    BT = "bt"
    SVD = "svd"
    DENSE = "dense"

    @property
    def folds(self) -> bool:
        """Whether matrices are folded into tensors; a truncated SVD takes them as they are."""
        return self not in (Format.SVD, Format.DENSE)

    @property
    def has_layouts(self) -> bool:
        """Whether there is more than one family of layouts to choose from."""
        return self in (Format.HT, Format.SVD)


class LayoutKind(StrEnum):
    """The families of layouts that a user may ask for; all of them are one code."""

    AUTO = "auto"
    SPLIT = "split"
    PAIRED = "paired"
    SVD = "svd"


class Scope(StrEnum):
    """Which matrices of a recurrent layer are put into HT form together."""

    AUTO = "auto"
    INTEGRATED = "integrated"
    SEPARATE = "separate"
    INPUT = "input"


class UnitOrder(StrEnum):
    """How the hidden units of a layer are ordered in its matrices, to make them fold well.

    `auto`: as folds best, with the order stored beside the matrices, where nobody outside of the layer sees it; as
    `readers` where that would take more than a tenth of the budget. `readers`: the units themselves are moved, and
    with them what the modules that read the layer's states have of them, which costs no numbers; code beside those
    modules finds states in another order. `keep`: as they are.
    """

    AUTO = "auto"
    READERS = "readers"
    KEEP = "keep"


WIDEST = 32
"""Bits that stand for the precision of the model, whichever it is."""

INTEGER_BITS = (8, 7, 6, 5, 4, 3, 2)
"""Bits of whole numbers with scales."""

BITS = (WIDEST, 16, *INTEGER_BITS)
"""In how many bits numbers may be stored."""

HARMLESS = 1e-3
"""The relative change of a core that is taken for rounding: twice what half precision does within its range."""


def one_of(kind: type[AnyWord], value: AnyWord | str, name: str) -> AnyWord:
    """The member of an enumeration that a word stands for. Raises `RequestError` where there is none."""
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"{name} is one of {', '.join(kind)}; found {str(value)!r:.80}.") from None

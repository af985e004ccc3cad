"""All codecs, in one place. A new one is a file of its own, a line of `CODECS`, and its bits in `vocabulary.BITS`."""

from __future__ import annotations

import torch

from htcompress.storage.codec import Codec, Plain
from htcompress.storage.half import Half
from htcompress.vocabulary import WIDEST

PLAIN = Plain()

CODECS: tuple[Codec, ...] = (PLAIN, Half())

_BY_BITS = {codec.bits: codec for codec in CODECS}
CODECS_BY_NAME = {codec.name: codec for codec in CODECS}


def codec_of(name: str) -> Codec:
    """The codec of a name. Raises `KeyError` where there is none."""
    return CODECS_BY_NAME[name]


def codec_within(bits: int, dtype: torch.dtype) -> Codec:
    """The codec of at most so many bits a number, for numbers of a dtype; as they are where they are no wider.

    Raises `KeyError` where there is none.
    """
    if dtype.itemsize * 8 <= bits or bits == WIDEST:
        return PLAIN
    return _BY_BITS[bits]

"""All codecs, in one place. A new one is a file of its own, a line of `CODECS`, and its bits in `vocabulary.BITS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from htcompress.storage.codec import Codec, Plain
from htcompress.storage.half import Half
from htcompress.storage.integer import Integer
from htcompress.vocabulary import INTEGER_BITS, WIDEST

PLAIN = Plain()

CODECS: tuple[Codec, ...] = (PLAIN, Half(), *map(Integer, INTEGER_BITS))

_BY_BITS = {codec.bits: codec for codec in CODECS}
_BY_NAME = {codec.name: codec for codec in CODECS}


def codec_of(config: Mapping[str, Any]) -> Codec:
    """The codec that `Codec.to_config` told, not fitted yet. Raises `KeyError` where there is none."""
    return _BY_NAME[config["name"]].of_config(config)


def codec_within(bits: int, dtype: torch.dtype) -> Codec:
    """The codec of at most so many bits a number, for numbers of a dtype; as they are where they are no wider.

    Raises `KeyError` where there is none.
    """
    if dtype.itemsize * 8 <= bits or bits == WIDEST:
        return PLAIN
    return _BY_BITS[bits]

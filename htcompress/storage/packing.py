"""Whole numbers of a few bits each, one after the other in bytes: the lowest bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 22  # numbers that are packed at a time, a multiple of eight


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 of any shape as bytes (`packed_bytes`,), in their order in memory."""
    flat = codes.detach().cpu().reshape(-1).numpy().astype(np.uint8)
    made = []
    for start in range(0, len(flat), _CHUNK):
        spread = np.unpackbits(flat[start : start + _CHUNK, None], axis=1, count=bits, bitorder="little")
        made.append(np.packbits(spread.reshape(-1), bitorder="little"))
    return torch.from_numpy(np.concatenate(made) if made else np.zeros(0, np.uint8))


def unpacked(stored: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of bytes, as uint8 (count,); the inverse of `packed`."""
    flat = stored.detach().cpu().numpy()
    made = []
    for start in range(0, count, _CHUNK):
        own = min(_CHUNK, count - start)
        first = start * bits // 8
        part = flat[first : first + packed_bytes(own, bits)]
        spread = np.unpackbits(part, count=own * bits, bitorder="little").reshape(own, bits)
        made.append(np.packbits(spread, axis=1, bitorder="little").reshape(-1))
    return torch.from_numpy(np.concatenate(made) if made else np.zeros(0, np.uint8))


def packed_bytes(count: int, bits: int) -> int:
    """The bytes of so many codes."""
    return -(-count * bits // 8)

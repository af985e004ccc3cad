"""Whether tensors still hold what they held: what is computed of parameters is kept only as long as they do.

A parameter may change without a trace: through `.data`, in a fused optimiser, under another name of its memory. So
the numbers themselves are looked at, byte by byte, which for the few thousand numbers of a compressed layer takes
less time than one call of a torch operation.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Remembered:
    """What tensors held (on the CPU, contiguous), to tell whether that has changed since.

    Args:
        read: what was computed with: looked at number by number.
        passed: what was handed on as it is, or as a view: it must only stand where it stood.
    """

    def __init__(self, read: Sequence[Tensor], passed: Sequence[Tensor]) -> None:
        self._copies = [tensor.detach().clone() for tensor in read]
        self._read = [(c.data_ptr(), c.nbytes, *_form(c)) for c in self._copies]
        self._passed = [(t.data_ptr(), *_form(t)) for t in passed]

    @staticmethod
    def can(tensors: Sequence[Tensor]) -> bool:
        """Whether they can be looked at: elsewhere than in the CPU's memory it would cost more than it saves."""
        return all(type(t) in _PLAIN and t.device.type == "cpu" and t.is_contiguous() for t in tensors)

    def holds(self, read: Sequence[Tensor], passed: Sequence[Tensor]) -> bool:
        """Whether the tensors are, bit by bit, what they were."""
        if len(read) != len(self._read) or len(passed) != len(self._passed):
            return False
        for tensor, (place, size, *form) in zip(read, self._read, strict=True):
            if _form(tensor) != tuple(form) or _memcmp(tensor.data_ptr(), place, size):
                return False
        return all((t.data_ptr(), *_form(t)) == seen for t, seen in zip(passed, self._passed, strict=True))


def _form(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype


_PLAIN = (Tensor, torch.nn.Parameter)

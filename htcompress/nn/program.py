"""When a layer is run by a program of C (`htcompress.native`), and its products of few vectors and a thin factor."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.native import library
from htcompress.nn.tracing import is_tracing

_WIDE, _THIN, _SEVERAL = 4096, 64, 16
"""A product is wide and thin from so many inputs on, up to such a rank; so many vectors torch shares among threads."""


def usable(*tensors: Tensor) -> bool:
    """Whether the program can read tensors, and nothing is to be learnt or looked on at: on a CPU, in float32."""
    if torch.is_grad_enabled() or is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if any(t.device.type != "cpu" or t.dtype is not torch.float32 for t in tensors):
        return False
    try:
        return all(isinstance(t, Tensor) and t.data_ptr() for t in tensors) and library() is not None
    except RuntimeError:  # tensors without memory of their own, as torch.func makes them
        return False


def is_thin(x: Float[Tensor, "vectors inputs"], factor: Float[Tensor, "inputs r"]) -> bool:
    """Whether `thin_product` is the faster way; the arguments are usable."""
    vectors, inputs = x.shape
    alone = vectors < _SEVERAL or torch.get_num_threads() == 1
    return alone and inputs >= _WIDE and factor.shape[1] <= _THIN and factor.stride(1) == 1 <= factor.stride(0)


def thin_product(x: Float[Tensor, "vectors inputs"], factor: Float[Tensor, "inputs r"]) -> Float[Tensor, "vectors r"]:
    """x C for few vectors, many inputs and a small r, where reading is what it takes; see `is_thin`."""
    program = library()
    if program is None:
        raise RuntimeError("There is no program to run; see `usable`.")
    x = x.contiguous()
    out = x.new_empty(len(x), factor.shape[1])
    sizes = (ctypes.c_int64(n) for n in (*x.shape, factor.shape[1], factor.stride(0)))
    program.thin_product(*sizes, *(ctypes.c_void_p(t.data_ptr()) for t in (x, factor, out)))
    return out

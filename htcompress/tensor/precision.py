"""What a precision can hold: the smallest relative error that may be asked for."""

from __future__ import annotations

import torch

from htcompress.errors import RequestError

_LOST = {torch.float32: 2.0**-24, torch.float64: 2.0**-46}
"""The relative error that a core brings in: in float32 the rounding to nearest of what was computed in float64; in
float64 what a decomposition of it leaves, 128 times the rounding of one number."""


def share_of_ranks(rtol: float, dtype: torch.dtype, cores: int) -> float:
    """What the ranks may lose of a relative error, so that it holds for the cores as they are stored.

    >>> share_of_ranks(1e-3, torch.float32, 3) < 1e-3
    True

    Args:
        rtol: what was asked for.
        dtype: of the stored cores.
        cores: how many there are.

    Raises `RequestError` where it is no relative error, or so small that rounding alone takes half of it.
    """
    if not rtol >= 0:
        raise RequestError(f"A relative error is a number >= 0; found {rtol}.")
    rounding = cores * _LOST.get(dtype, torch.finfo(dtype).eps / 2)
    if rtol < 2 * rounding:
        raise RequestError(
            f"A relative error of {rtol:g} cannot be held by {cores} cores in {str(dtype).removeprefix('torch.')}: the "
            f"smallest is {2 * rounding:.2g}. Ask for that, give the tensor in float64, or leave the error out for a "
            f"form as exact as its precision."
        )
    return rtol - rounding

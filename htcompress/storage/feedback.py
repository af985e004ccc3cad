"""Rounding whose errors make up for each other: Babai's nearest plane in a metric that is a Kronecker product.

Numbers are rounded one after the other, from the last row and column to the first. Each is moved first by what the
errors made so far leave to be made up for, so that of the squared error ||L_G^T E L_A||^2 (G = L_G L_G^T the metric of
the rows, A = L_A L_A^T that of the columns) only what is its own is left to it. With the columns' metric alone this is
the feedback of OPTQ (Frantar et al. 2023, arXiv 2210.17323; that it is Babai's algorithm: Birnick 2025, arXiv
2507.18553).
"""

from __future__ import annotations

import ctypes
from functools import partial

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from htcompress.native import library
from htcompress.storage.integer import nearest_levels

Array = NDArray[np.float64]

_TILE = 32
"""Rows and columns of a tile, in the program of C as well. Within tiles numbers are rounded along antidiagonals, which
do not see each other."""

_DAMPING = 1e-8
"""What is added to a moment that is not positive, as a part of its mean eigenvalue; tenfold until it is."""


def nearest_plane(
    values: Tensor, steps: Tensor, bits: int, rows: Tensor | None = None, cols: Tensor | None = None
) -> Tensor:
    """A matrix rounded so that its error is small in a metric.

    Args:
        values: (m, n), in float64.
        steps: (m,), the unit of each row; in a row of unit zero all becomes zero.
        bits: of the levels that numbers are rounded to, in units; see `nearest_levels`.
        rows: (m, m), L of the metric of the rows, L diag(d) L^T (see `unit_lower`); None: the identity.
        cols: (n, n), L of that of the columns; None: the identity.
    """
    m, n = values.shape
    if rows is None or m == 1:
        return _columnwise(values, steps, bits, None if cols is None or n == 1 else cols)
    if cols is None or n == 1:
        # The same with rows and columns exchanged, but that each row keeps its unit.
        return _rowwise(values, steps, bits, rows)
    program = library()
    errors = _tiled if program is None else partial(_compiled, program)
    return values - errors(*_padded(values, steps, rows, cols), bits)[:m, :n]


def unit_lower(moment: Tensor) -> tuple[Tensor, Tensor]:
    """L, lower triangular with a diagonal of ones, and d with moment = L diag(d) L^T; damped until it is positive."""
    size = float(moment.diagonal().mean())
    if not size > 0:
        return torch.eye(len(moment), dtype=moment.dtype), moment.new_ones(len(moment))
    damping = 0.0
    while True:
        own = moment if damping == 0.0 else moment + damping * size * torch.eye(len(moment), dtype=moment.dtype)
        factor, failed = torch.linalg.cholesky_ex(own)
        if not int(failed):
            diagonal = factor.diagonal()
            return (factor / diagonal).contiguous(), diagonal.square()
        damping = 10 * damping or _DAMPING


def _inverse(steps: Array) -> Array:
    return np.divide(1.0, steps, out=np.zeros_like(steps), where=steps != 0)


def _columnwise(values: Tensor, steps: Tensor, bits: int, cols: Tensor | None) -> Tensor:
    units = steps.numpy()
    inverse = _inverse(units)
    if cols is None:
        found = nearest_levels(values.numpy() * inverse[:, None], bits) * units[:, None]
        return torch.from_numpy(found)
    # Columns are what is walked along: they lie together.
    own, errors = values.T.contiguous().numpy(), torch.zeros(values.shape[::-1], dtype=values.dtype)
    below = cols.T.contiguous()
    made = errors.numpy()
    for j in range(len(own) - 1, -1, -1):
        moved = own[j] + (below[j, j + 1 :] @ errors[j + 1 :]).numpy()
        made[j] = own[j] - nearest_levels(moved * inverse, bits) * units
    return values - errors.T


def _rowwise(values: Tensor, steps: Tensor, bits: int, rows: Tensor) -> Tensor:
    own, errors = values.contiguous().numpy(), torch.zeros_like(values, memory_format=torch.contiguous_format)
    made, units = errors.numpy(), steps.numpy()
    inverse, below = _inverse(units), rows.T.contiguous()
    for i in range(len(own) - 1, -1, -1):
        moved = own[i] + (below[i, i + 1 :] @ errors[i + 1 :]).numpy()
        made[i] = own[i] - nearest_levels(moved * inverse[i], bits) * units[i]
    return values - errors


def _padded(values: Tensor, steps: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `nearest_plane` up to whole tiles, with zeros, and with ones on the diagonals."""
    m, n = (-(-length // _TILE) * _TILE for length in values.shape)
    full, units = values.new_zeros(m, n), values.new_zeros(m)
    full[: values.shape[0], : values.shape[1]], units[: len(steps)] = values, steps
    return full, units, _widened(rows, m), _widened(cols, n)


def _widened(lower: Tensor, size: int) -> Tensor:
    if len(lower) == size:
        return lower.contiguous()
    wide = torch.eye(size, dtype=lower.dtype)
    wide[: len(lower), : len(lower)] = lower
    return wide


def _tiled(full: Tensor, units: Tensor, lower_rows: Tensor, lower_cols: Tensor, bits: int) -> Tensor:
    """The errors of a matrix of whole tiles."""
    size = full.shape
    down, across = size[0] // _TILE, size[1] // _TILE
    # Of decided numbers: the errors E, and H = E L_A up to each column, which the rows above make up for.
    errors, passed = full.new_zeros(size), full.new_zeros(size)
    made_errors, made_passed = errors.numpy(), passed.numpy()
    for diagonal in range(down + across - 2, -1, -1):
        tiles = [(i, diagonal - i) for i in range(max(0, diagonal - across + 1), min(down - 1, diagonal) + 1)]
        spans = [(slice(i * _TILE, (i + 1) * _TILE), slice(j * _TILE, (j + 1) * _TILE)) for i, j in tiles]
        own_errors, own_passed = _rounded_tiles(
            torch.stack([full[a, b] for a, b in spans]).numpy(),
            torch.stack([errors[a, b.stop :] @ lower_cols[b.stop :, b] for a, b in spans]).numpy(),
            torch.stack([lower_rows[a.stop :, a].T @ passed[a.stop :, b] for a, b in spans]).numpy(),
            torch.stack([lower_rows[a, a].T for a, _ in spans]).numpy(),
            torch.stack([lower_cols[b, b].T for _, b in spans]).numpy(),
            torch.stack([units[a] for a, _ in spans]).numpy(),
            bits,
        )
        for k, (a, b) in enumerate(spans):
            made_errors[a, b], made_passed[a, b] = own_errors[k], own_passed[k]
    return errors


def _compiled(
    program: ctypes.CDLL, full: Tensor, units: Tensor, lower_rows: Tensor, lower_cols: Tensor, bits: int
) -> Tensor:
    """`_tiled` by the program of C, which is its equal but for rounding."""
    errors, passed = torch.empty_like(full), torch.empty_like(full)
    sizes = *(ctypes.c_int64(size) for size in full.shape), ctypes.c_double(1 << bits - 1)
    places = (t.data_ptr() for t in (full, units, lower_rows, lower_cols, errors, passed))
    program.nearest_plane(*sizes, *map(ctypes.c_void_p, places))
    return errors


def _rounded_tiles(
    values: Array,
    from_right: Array,
    from_below: Array,
    upper_rows: Array,
    upper_cols: Array,
    units: Array,
    bits: int,
) -> tuple[Array, Array]:
    """E and H of tiles that do not see each other, (tiles, rows, cols) each, from the last row and column to the first.

    Antidiagonal by antidiagonal, each with a place for every row: those beyond the tile stand in a margin, which holds
    zeros, or numbers that no one reads. All that a step reads or writes is a view then, and what it costs is the calls.
    """
    count, size = len(values), _TILE
    last, width = 2 * size - 2, 3 * size - 2
    own, right = _antidiagonals(values), _antidiagonals(from_right)
    base = own + right + _antidiagonals(from_below)
    inverse = _inverse(units)
    # Columns backwards, so that those of an antidiagonal ascend with its rows: column j stands at last - j.
    factors = np.zeros((count, width, size))
    factors[:, size - 1 : 2 * size - 1] = upper_cols[:, ::-1]
    errors, passed = np.zeros((count, size, width)), np.zeros((count, width, size))
    inner = errors[:, :, size - 1 : 2 * size - 1]
    flat_errors, flat_passed = errors.reshape(count, -1), passed.reshape(count, -1)
    for at in range(last, -1, -1):
        rows = slice(last - at, last - at + size)
        more = np.einsum("tij,tij->ti", inner, factors[:, rows])
        moved = base[:, at] + more
        moved += np.einsum("tij,tij->ti", passed[:, rows], upper_rows)
        error = own[:, at] - nearest_levels(moved * inverse, bits) * units
        flat_errors[:, size - 1 + at :: width - 1][:, :size] = error
        more += right[:, at]
        more += error
        flat_passed[:, (last - at) * size :: size + 1][:, :size] = more
    return inner, passed[:, size - 1 : 2 * size - 1][:, ::-1].transpose(0, 2, 1)


def _antidiagonals(tiles: Array) -> Array:
    """Number i of antidiagonal k is that of row i and column k - i; zero beyond the tile. (tiles, 2 size - 1, size)."""
    count, size, _ = tiles.shape
    wide = np.zeros((count, size, 3 * size - 2))
    wide[:, :, size - 1 : 2 * size - 1] = tiles
    whole, row, one = wide.strides
    start = wide[:, :, size - 1 :]
    return np.ascontiguousarray(as_strided(start, (count, 2 * size - 1, size), (whole, one, row - one)))

"""Rounding whose errors make up for each other: Babai's nearest plane in a metric that is a Kronecker product.

Numbers are rounded one after the other, from the last row and column to the first. Each is moved first by what the
errors made so far leave to be made up for, so that of the squared error ||L_G^T E L_A||^2 (G = L_G L_G^T the metric of
the rows, A = L_A L_A^T that of the columns) only what is its own is left to it. With the columns' metric alone this is
the feedback of OPTQ (Frantar et al. 2023, arXiv 2210.17323; that it is Babai's algorithm: Birnick 2025, arXiv
2507.18553).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TILE = 32
"""Rows and columns of a tile. Within tiles numbers are rounded along antidiagonals, which do not see each other."""

_DAMPING = 1e-8
"""What is added to a moment that is not positive, as a part of its mean eigenvalue; tenfold until it is."""


def nearest_plane(
    values: Tensor, rounded: Callable[[Tensor, Tensor], Tensor], rows: Tensor | None = None, cols: Tensor | None = None
) -> Tensor:
    """A matrix rounded so that its error is small in a metric.

    Args:
        values: (m, n), in float64.
        rounded: of some numbers and of the rows that they stand in, (k,) each, what they are rounded to.
        rows: (m, m), the metric of the rows; None: the identity.
        cols: (n, n), that of the columns; None: the identity.
    """
    m, n = values.shape
    if rows is None or m == 1:
        return _columnwise(values, rounded, None if cols is None or n == 1 else unit_lower(cols)[0])
    if cols is None or n == 1:
        # The same with rows and columns exchanged, but that each row keeps its grid.
        return _rowwise(values, rounded, unit_lower(rows)[0])
    return _tiled(values, rounded, unit_lower(rows)[0], unit_lower(cols)[0])


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
            return factor / diagonal, diagonal.square()
        damping = 10 * damping or _DAMPING


def _columnwise(values: Tensor, rounded: Callable[[Tensor, Tensor], Tensor], cols: Tensor | None) -> Tensor:
    every = torch.arange(len(values))
    found, errors = torch.empty_like(values), torch.zeros_like(values)
    for j in range(values.shape[1] - 1, -1, -1):
        own = values[:, j]
        moved = own if cols is None else own + errors[:, j + 1 :] @ cols[j + 1 :, j]
        found[:, j] = rounded(moved, every)
        errors[:, j] = own - found[:, j]
    return found


def _rowwise(values: Tensor, rounded: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    found, errors = torch.empty_like(values), torch.zeros_like(values)
    for i in range(len(values) - 1, -1, -1):
        moved = values[i] + rows[i + 1 :, i] @ errors[i + 1 :]
        found[i] = rounded(moved, torch.full((values.shape[1],), i))
        errors[i] = values[i] - found[i]
    return found


def _tiled(values: Tensor, rounded: Callable[[Tensor, Tensor], Tensor], rows: Tensor, cols: Tensor) -> Tensor:
    m, n = values.shape
    down, across = -(-m // _TILE), -(-n // _TILE)
    size = down * _TILE, across * _TILE
    full = values.new_zeros(size)
    full[:m, :n] = values
    lower_rows, lower_cols = _padded(rows, size[0]), _padded(cols, size[1])
    # Of decided numbers: the errors E, and H = E L_A up to each column, which the rows above make up for.
    errors, passed, found = full.new_zeros(size), full.new_zeros(size), full.clone()
    for diagonal in range(down + across - 2, -1, -1):
        tiles = [(i, diagonal - i) for i in range(max(0, diagonal - across + 1), min(down - 1, diagonal) + 1)]
        spans = [(slice(i * _TILE, (i + 1) * _TILE), slice(j * _TILE, (j + 1) * _TILE)) for i, j in tiles]
        from_right = torch.stack([errors[a, b.stop :] @ lower_cols[b.stop :, b] for a, b in spans])
        from_below = torch.stack([lower_rows[a.stop :, a].T @ passed[a.stop :, b] for a, b in spans])
        own = torch.stack([full[a, b] for a, b in spans])
        tile = _Tile(own, from_right, from_below, torch.tensor([a.start for a, _ in spans]), m)
        tile.round(
            rounded,
            torch.stack([lower_rows[a, a].T for a, _ in spans]),
            torch.stack([lower_cols[b, b].T for _, b in spans]),
        )
        for k, (a, b) in enumerate(spans):
            errors[a, b], passed[a, b], found[a, b] = tile.errors[k], tile.passed[k], own[k] - tile.errors[k]
    return found[:m, :n]


def _padded(lower: Tensor, size: int) -> Tensor:
    padded = torch.eye(size, dtype=lower.dtype)
    padded[: len(lower), : len(lower)] = lower
    return padded


class _Tile:
    """Tiles that do not see each other, (tiles, rows, cols)."""

    def __init__(self, values: Tensor, from_right: Tensor, from_below: Tensor, starts: Tensor, most: int) -> None:
        self.values, self.from_right, self.from_below = values, from_right, from_below
        self.starts, self.most = starts, most
        self.errors, self.passed = torch.zeros_like(values), torch.zeros_like(values)

    def round(self, rounded: Callable[[Tensor, Tensor], Tensor], upper_rows: Tensor, upper_cols: Tensor) -> None:
        """Antidiagonal by antidiagonal, from the last row and column to the first."""
        for at in range(2 * _TILE - 2, -1, -1):
            i = torch.arange(max(0, at - _TILE + 1), min(_TILE - 1, at) + 1)
            j = at - i
            right = self.from_right[:, i, j] + (self.errors[:, i] * upper_cols[:, j]).sum(-1)
            below = self.from_below[:, i, j] + (self.passed.transpose(1, 2)[:, j] * upper_rows[:, i]).sum(-1)
            own = self.values[:, i, j]
            rows = (self.starts[:, None] + i).clamp_max(self.most - 1)
            error = own - rounded((own + right + below).flatten(), rows.flatten()).reshape(own.shape)
            self.errors[:, i, j], self.passed[:, i, j] = error, error + right

"""Babai's nearest plane against itself, number by number in the Kronecker product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from htcompress.storage.feedback import nearest_plane, unit_lower


def moment(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    return root.T @ (torch.logspace(0, -2, 2 * size, dtype=torch.float64)[:, None] * root)


def lower(metric: Tensor | None) -> Tensor | None:
    return None if metric is None else unit_lower(metric)[0]


def one_by_one(values: Tensor, steps: Tensor, metric: Tensor) -> Tensor:
    """The oracle: the numbers as a vector, the last first, in the whole metric."""
    factor, _ = unit_lower(metric)
    flat, every = values.reshape(-1), steps[:, None].expand(values.shape).reshape(-1)
    found = flat.clone()
    for k in range(len(flat) - 1, -1, -1):
        moved = flat[k] + factor[k + 1 :, k] @ (flat - found)[k + 1 :]
        found[k] = (moved / every[k]).round() * every[k]
    return found.reshape(values.shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 12), (40, 3), (3, 40), (33, 65), (70, 45)])
def test_equals_the_vector_algorithm(shape: tuple[int, int]) -> None:
    m, n = shape
    values, steps = torch.randn(m, n, dtype=torch.float64), torch.rand(m, dtype=torch.float64) + 0.5
    rows, cols = moment(m, 1), moment(n, 2)
    for own_rows, own_cols in ((rows, cols), (rows, None), (None, cols), (None, None)):
        metric = torch.kron(
            torch.eye(m, dtype=torch.float64) if own_rows is None else own_rows,
            torch.eye(n, dtype=torch.float64) if own_cols is None else own_cols,
        )
        found = nearest_plane(values, steps, np.rint, lower(own_rows), lower(own_cols))
        assert torch.allclose(found, one_by_one(values, steps, metric), atol=1e-9)


def test_the_error_is_that_of_its_own_steps() -> None:
    """||E||^2 in the metric is at most what each number's half step is worth where all others are made up for."""
    rows, cols, steps = moment(20, 3), moment(30, 4), torch.full((20,), 0.3, dtype=torch.float64)
    values = torch.randn(20, 30, dtype=torch.float64)
    error = values - nearest_plane(values, steps, np.rint, lower(rows), lower(cols))
    own = torch.outer(unit_lower(rows)[1], unit_lower(cols)[1])
    assert float((rows @ error @ cols * error).sum()) <= float((own * 0.15**2).sum())
    plain = values - (values / 0.3).round() * 0.3
    assert (rows @ error @ cols * error).sum() < (rows @ plain @ cols * plain).sum()


def test_moments_that_are_singular_are_damped() -> None:
    vector = torch.randn(6, dtype=torch.float64)
    for singular in (torch.outer(vector, vector), torch.zeros(6, 6, dtype=torch.float64)):
        factor, diagonal = unit_lower(singular)
        assert torch.isfinite(factor).all()
        assert (diagonal > 0).all()

"""Blocks of columns against the matrix written out."""

from __future__ import annotations

import pytest
import torch

from htcompress.matrix import blocks
from htcompress.matrix.blocks import DOUBLED, Block, Blocks, chunked_gram, thin_product, working


def test_a_gram_matrix_of_more_rows_than_are_computed_at_a_time() -> None:
    matrix = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0))
    expected = matrix.double() @ matrix.double().T
    found = chunked_gram(matrix)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


def test_blocks_are_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 11, generator=generator)
    matrix = Blocks([Block(part) for part in w.split([4, 6, 1], dim=1)])
    right = torch.randn(11, 2, generator=generator, dtype=torch.float64)
    left = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    exact = w.double()
    assert matrix.sizes == [4, 6, 1]
    assert matrix.numel() == 66
    assert torch.equal(matrix.dense(), w)
    assert torch.allclose(matrix.times(right), exact @ right)
    assert torch.allclose(matrix.transposed(left), exact.T @ left)
    assert torch.allclose(matrix.gram(), exact @ exact.T)
    pieces = list(matrix.chunks())
    assert torch.equal(torch.cat([piece for _, piece in pieces], dim=1), exact)
    assert [(where.start, where.stop) for where, _ in pieces] == [(0, 4), (4, 10), (10, 11)]


def test_large_factors_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 11, generator=generator)
    matrix = Blocks([Block(part) for part in w.split([4, 6, 1], dim=1)])
    right = torch.randn(11, 2, generator=generator, dtype=torch.float64)
    left = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(blocks, "LARGE", 1)
    monkeypatch.setattr(blocks, "_CHUNK", 6)
    assert torch.allclose(matrix.times(right), w.double() @ right)
    assert torch.allclose(matrix.transposed(left), w.double().T @ left)


def test_rows_have_an_order_without_being_moved() -> None:
    generator = torch.Generator().manual_seed(0)
    w, order = torch.randn(6, 11, generator=generator), torch.randperm(6, generator=generator)
    a, b = w.split([4, 7], dim=1)
    matrix, exact = Blocks([Block(a, order), Block(b[order])]), w[order].double()
    right = torch.randn(11, 2, generator=generator, dtype=torch.float64)
    left = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    other = Block(torch.randn(4, 3, generator=generator))
    assert torch.equal(matrix.dense(), w[order])
    assert torch.allclose(matrix.times(right), exact @ right)
    assert torch.allclose(matrix.transposed(left), exact.T @ left)
    assert torch.allclose(matrix.gram(), exact @ exact.T)
    assert torch.equal(torch.cat([piece for _, piece in matrix.chunks()], dim=1), exact)
    assert torch.allclose(matrix.parts[0].times_block(other), exact[:, :4] @ other.tensor.double())
    assert torch.allclose(matrix.parts[0].inner, exact[:, :4].T @ exact[:, :4])


def test_a_product_with_a_block_is_found_once() -> None:
    a, b = Block(torch.randn(3, 4)), Block(torch.randn(4, 2))
    assert a.times_block(b) is a.times_block(b)
    assert torch.allclose(a.times_block(b), a.tensor.double() @ b.tensor.double())


def test_thin_products_and_precisions() -> None:
    matrix, factor = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    assert torch.allclose(thin_product(matrix, factor), matrix @ factor)
    assert working(torch.zeros(2, 2)).dtype == torch.float64
    assert working(torch.zeros(1).expand(DOUBLED + 1)).dtype == torch.float32

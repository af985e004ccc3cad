"""Structures: the published counts, and cores that make the matrix that plain sums make of them."""

from __future__ import annotations

import pytest
import torch
from oracles import distance
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.forms import BlockTerm, NetworkMatrix, TensorRing, TensorTrain
from htcompress.forms.structure import Structure
from htcompress.matrix import Layout
from htcompress.tensor import DimensionTree, HTTensor
from htcompress.vocabulary import Format

DENSE = 57_600 * 256 * 4
PAPERS = Layout.paired((16, 4, 4, 4), (8, 20, 20, 18))
"""57,600 inputs to the four gates of 256 units, the gates in the first mode."""


@pytest.mark.parametrize(
    ("structure", "published", "times"),
    [(TensorTrain(PAPERS, (1, 4, 4, 4)), 3360, 17554), (BlockTerm(PAPERS, (2, 4)), 3392, 17388)],
    ids=["tensor train", "block term"],
)
def test_published_counts(structure: Structure, published: int, times: int) -> None:
    assert DENSE == 58_982_400
    assert structure.parameters == published
    assert DENSE // structure.parameters == times


def test_published_counts_are_undercut() -> None:
    """1,725 of a tensor ring and 1,245 of HT, by settings of the same folding."""
    assert TensorRing(PAPERS, (2, 2, 2, 2)).parameters == 1440
    assert (DENSE // 1440, DENSE // 1143) == (40_960, 51_603)
    tree = DimensionTree.balanced(4)
    assert HTTensor.zeros(tree, PAPERS.shape, [3, 3, 3, 3, 3, 3, 1]).expanded().parameters == 1143


SMALL = Layout.paired((2, 3, 2), (3, 2, 4), rows=11, cols=23)
STRUCTURES: list[Structure] = [
    TensorTrain(SMALL, (1, 3, 2)),
    TensorRing(SMALL, (2, 3, 2)),
    BlockTerm(SMALL, (3, 2)),
    TensorTrain(Layout.paired((3, 4), (5, 2)), (1, 2)),
]


def written_out(structure: Structure, cores: list[Tensor]) -> Tensor:
    """The folded tensor entry by entry, as the formats are defined."""
    full = torch.zeros(structure.layout.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in full.shape)).tolist():
        if structure.format is Format.BT:
            value = torch.tensor(0.0, dtype=torch.float64)
            for block in range(structure.ranks[0]):
                part = cores[-1][..., block]
                for k, i in enumerate(index):
                    part = torch.tensordot(cores[k][i, :, block], part, dims=1)
                value = value + part
        else:
            product = torch.eye(structure.ranks[0], dtype=torch.float64)
            for k, i in enumerate(index):
                product = product @ cores[k][:, i, :]
            value = product.trace()
        full[tuple(index)] = value
    return full


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_cores_make_the_matrix(structure: Structure) -> None:
    torch.manual_seed(0)
    cores = [torch.randn(shape, dtype=torch.float64) for shape in structure.shapes]
    matrix = NetworkMatrix(structure, tuple(cores))
    expected = structure.layout.unfold(written_out(structure, cores))
    assert distance(matrix.dense(), expected) < 1e-12
    x = torch.randn(3, 2, structure.layout.cols, dtype=torch.float64)
    assert distance(matrix.network.times(matrix.operands(), x), x @ expected.T) < 1e-12
    assert distance(matrix.balance().dense(), expected) < 1e-12
    assert matrix.parameters == sum(core.numel() for core in matrix.cores)
    assert type(structure).from_config(structure.to_config()) == structure


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ShapeError, match="as many ranks"):
        TensorTrain(SMALL, (1, 2))
    with pytest.raises(ShapeError, match="number of blocks"):
        BlockTerm(SMALL, (2,))
    with pytest.raises(ShapeError, match="do not fit"):
        NetworkMatrix(TensorTrain(SMALL, (1, 2, 2)), (torch.zeros(1),))

"""The freedom of an HT tensor's bases: at every edge they may be turned without changing the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from htcompress.tensor.ht import Core, HTTensor


def turned(tensor: HTTensor, seed: int = 0) -> HTTensor:
    """The same tensor with the basis of every edge turned at random.

    Large and small entries are mixed: those of a core become alike, and none is much larger than the others. What is
    rounded to one grid for all of a core loses less then (incoherence, as in Chee et al. 2023, arXiv 2307.13304).
    Edges at a core that is an identity keep their basis, for it would be none afterwards; a root that is one lets both
    of its sides be turned alike.
    """
    generator = torch.Generator().manual_seed(seed)
    tree, cores = tensor.tree, list(tensor.cores)

    def stored(node: int) -> bool:
        return isinstance(cores[node], Tensor)

    for node in tree.inner_nodes:
        children = [tree.nodes[child] for child in node.children or ()]
        if not stored(node.index):
            if node.parent is None and all(stored(child.index) for child in children):
                turn = _orthogonal(tensor.ranks[children[0].index], generator)
                for child in children:
                    cores[child.index] = _upward(cores[child.index], turn)
            continue
        for side, child in enumerate(children):
            if stored(child.index):
                turn = _orthogonal(tensor.ranks[child.index], generator)
                cores[child.index] = _upward(cores[child.index], turn)
                cores[node.index] = _downward(cores[node.index], turn, side)
    return HTTensor(tree, tensor.shape, tensor.ranks, tuple(cores))


def _upward(core: Core, turn: Tensor) -> Core:
    return core if not isinstance(core, Tensor) else (core.double() @ turn).to(core.dtype)


def _downward(core: Core, turn: Tensor, side: int) -> Core:
    if not isinstance(core, Tensor):
        return core
    return torch.einsum("ab,acd->bcd" if side == 0 else "ab,cad->cbd", turn, core.double()).to(core.dtype)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(drawn).Q

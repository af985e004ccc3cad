"""The Hierarchical Tucker tensor and its algebra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, prod

import torch
from jaxtyping import Float
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.tensor.precision import share_of_ranks
from htcompress.tensor.projection import left_singular
from htcompress.tensor.ranks import parameter_count, ranks_for_error
from htcompress.tensor.tree import DimensionTree, Node

_WEIGHTLESS = 1e-14  # of an edge's largest singular value: what float64 leaves of a direction that is not there
_LEAST_SHARE = 1e-8  # of an edge's largest singular value: below it a direction is not worth a division


@dataclass(frozen=True)
class Identity:
    """A core that is an identity, which nobody stores.

    `shape` is that of the core: (n, n) at a leaf, (r_left, r_right, r_left * r_right) at an inner node, (r, r, 1) at
    the root.
    """

    shape: tuple[int, ...]

    def written_out(self, like: Tensor) -> Tensor:
        """The core in numbers, of the dtype and on the device of another."""
        size = self.shape[0] if self.shape[-1] == 1 else self.shape[-1]
        return torch.eye(size, dtype=like.dtype, device=like.device).reshape(self.shape)


Core = Tensor | Identity


@dataclass(frozen=True, eq=False)
class HTTensor:
    """A tensor of order d as a dimension tree with one small core at every node.

    A leaf k holds `U_k` (n_k, r_k), an inner node `B_t` (r_left, r_right, r_t), the root has r = 1.
    A core may be an `Identity`, which nobody stores (a leaf with r = n, an inner node with
    r_t = r_left * r_right, a root with r_left = r_right); `compact` finds all of them.

    >>> import torch
    >>> tree = DimensionTree.balanced(2)
    >>> a, b = torch.ones(3, 1), torch.ones(4, 1)
    >>> x = HTTensor.from_cores(tree, [a, b, torch.full((1, 1, 1), 2.0)])
    >>> x.dense().sum().item(), x.parameters
    (24.0, 8)

    Source: Grasedyck 2010, "Hierarchical singular value decomposition of tensors".
    """

    tree: DimensionTree
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    cores: tuple[Core, ...]

    @classmethod
    def from_cores(cls, tree: DimensionTree, cores: Sequence[Tensor]) -> HTTensor:
        """The tensor that has these cores, one for each of `tree.nodes`. Raises `ShapeError` on a misfit."""
        if len(cores) != len(tree.nodes):
            raise ShapeError(f"A tree of {len(tree.nodes)} nodes needs as many cores; found {len(cores)}.")
        ranks = tuple(core.shape[-1] for core in cores)
        for node, core in zip(tree.nodes, cores, strict=True):
            expected = (
                (core.shape[0], ranks[node.index])
                if node.children is None
                else (*(ranks[child] for child in node.children), ranks[node.index])
            )
            if tuple(core.shape) != expected:
                raise ShapeError(f"Core {node.name} has shape {tuple(core.shape)}; expected {expected}.")
        if ranks[-1] != 1:
            raise ShapeError(f"The root of an HT tensor has rank 1; found {ranks[-1]}.")
        shape = tuple(cores[leaf.index].shape[0] for leaf in tree.leaf_nodes)
        return cls(tree, shape, ranks, tuple(cores))

    @classmethod
    def zeros(cls, tree: DimensionTree, shape: Sequence[int], ranks: Sequence[int]) -> HTTensor:
        """The compact tensor of these ranks with zero cores: the structure without the numbers."""
        sizes = [
            shape[node.leaves[0]] if node.children is None else ranks[node.children[0]] * ranks[node.children[1]]
            for node in tree.nodes
        ]
        identity = [size == rank for size, rank in zip(sizes, ranks, strict=True)]
        left, right = tree.root.children or (0, 0)
        somewhere = not (identity[left] and identity[right]) or (ranks[left] == 1 and not all(identity[:-1]))
        identity[-1] = tree.order > 1 and ranks[left] == ranks[right] and somewhere
        cores: list[Core] = []
        for node in tree.nodes:
            below = [shape[node.leaves[0]]] if node.children is None else [ranks[c] for c in node.children]
            size = (*below, ranks[node.index])
            cores.append(
                Identity(size) if identity[node.index] else torch.zeros(size, dtype=torch.float32, device="cpu")
            )
        return cls(tree, tuple(shape), tuple(ranks), tuple(cores))

    # ---- what it holds -------------------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return sum(core.numel() for core in self.stored)

    @property
    def stored(self) -> list[Tensor]:
        """The cores that are no identities."""
        return [core for core in self.cores if isinstance(core, Tensor)]

    @property
    def dtype(self) -> torch.dtype:
        return self.stored[0].dtype

    @property
    def device(self) -> torch.device:
        return self.stored[0].device

    def core(self, node: Node) -> Tensor:
        """The core of `node`, written out even where it is an identity."""
        core = self.cores[node.index]
        return core if isinstance(core, Tensor) else core.written_out(self.stored[0])

    def expanded(self) -> HTTensor:
        """The same tensor with every identity written out."""
        return replace(self, cores=tuple(self.core(node) for node in self.tree.nodes))

    def map(self, function: Callable[[Tensor], Tensor]) -> HTTensor:
        """The tensor with `function` applied to each stored core (a cast, a move, a detach)."""
        return replace(self, cores=tuple(function(c) if isinstance(c, Tensor) else c for c in self.cores))

    # ---- reconstruction ------------------------------------------------------------------------------

    def frame(self, node: Node) -> Float[Tensor, "n r"]:
        """The matrix U_t (product of the modes below the node in the tree's order, r_t)."""
        if node.children is None:
            return self.core(node)
        left, right = (self.frame(self.tree.nodes[child]) for child in node.children)
        rank = self.ranks[node.index]
        if isinstance(self.cores[node.index], Identity):
            if node.parent is None:
                return (left @ right.T).reshape(-1, 1)
            return torch.einsum("al,br->ablr", left, right).reshape(-1, rank)
        core = self.core(node)
        # The cheaper child first keeps the intermediate small.
        half = (left @ core.flatten(1)).reshape(left.shape[0], right.shape[1], rank)
        return torch.einsum("art,br->abt", half, right).reshape(-1, rank)

    def dense(self) -> Tensor:
        """The full tensor of shape `shape`."""
        order = self.tree.root.leaves
        full = self.frame(self.tree.root).reshape([self.shape[k] for k in order])
        return full.permute([order.index(k) for k in range(len(order))])

    # ---- algebra -------------------------------------------------------------------------------------

    def dot(self, other: HTTensor) -> Tensor:
        """The inner product with a tensor of the same shape and tree, without writing either out."""
        return self._cross(other)[-1].reshape(())

    def _cross(self, other: HTTensor) -> list[Tensor]:
        """U_t^T V_t for every node t: (r_t of self, r_t of other)."""
        if self.tree != other.tree or self.shape != other.shape:
            raise ShapeError(
                f"An operation on two HT tensors needs one tree and shape; found {self.tree.nested} "
                f"{self.shape} and {other.tree.nested} {other.shape}."
            )
        cross: list[Tensor] = []
        for node in self.tree.nodes:
            mine, theirs = self.core(node), other.core(node)
            if node.children is None:
                cross.append(mine.T @ theirs)
            else:
                left, right = (cross[child] for child in node.children)
                cross.append(_turned(mine, left.T, right.T).flatten(0, 1).T @ theirs.flatten(0, 1))
        return cross

    def norm(self) -> Tensor:
        """The Frobenius norm, accurate also for the small difference of two tensors."""
        return torch.linalg.vector_norm(self.orthogonalise().core(self.tree.root))

    def __add__(self, other: HTTensor) -> HTTensor:
        """The sum; its ranks are the sums of the ranks."""
        if self.tree != other.tree or self.shape != other.shape:
            raise ShapeError(f"Cannot add HT tensors of shapes {self.shape} and {other.shape} or unlike trees.")
        if self.tree.order == 1:
            return HTTensor.from_cores(self.tree, [self.core(self.tree.root) + other.core(self.tree.root)])
        cores = []
        for node in self.tree.nodes:
            a, b = self.core(node), other.core(node)
            if node.children is None:
                cores.append(torch.cat([a, b], dim=1))
                continue
            rank = 1 if node.parent is None else a.shape[2] + b.shape[2]
            core = a.new_zeros(a.shape[0] + b.shape[0], a.shape[1] + b.shape[1], rank)
            core[: a.shape[0], : a.shape[1], : a.shape[2]] = a
            core[a.shape[0] :, a.shape[1] :, rank - b.shape[2] :] = b
            cores.append(core)
        return HTTensor.from_cores(self.tree, cores)

    def __mul__(self, factor: float) -> HTTensor:
        """The tensor scaled by a number."""
        cores = self.expanded().stored
        cores[-1] = cores[-1] * factor
        return replace(self, cores=tuple(cores))

    __rmul__ = __mul__

    def __sub__(self, other: HTTensor) -> HTTensor:
        return self + (-1.0) * other

    def orthogonalise(self) -> HTTensor:
        """The same tensor with orthonormal columns in every frame but the root's."""
        cores: list[Tensor] = []
        carry: dict[int, Tensor] = {}
        for node in self.tree.nodes:
            core = self.core(node)
            if node.children is not None:
                left, right = (carry.pop(child) for child in node.children)
                core = _turned(core, left, right)
            if node.parent is not None:
                q, carry[node.index] = torch.linalg.qr(core.reshape(-1, core.shape[-1]))
                core = q.reshape(*core.shape[:-1], -1)
            cores.append(core)
        return HTTensor.from_cores(self.tree, cores)

    def canonical(self) -> tuple[HTTensor, tuple[Float[Tensor, " r"], ...]]:
        """The tensor in its singular bases, and the singular values at every edge.

        In this form truncation is slicing. Directions without weight (below 1e-14 of the norm) are
        dropped. The root's entry is its norm. Source: Grasedyck 2010, section 3.4, with singular value
        decompositions in place of his Gram matrices, which tell nothing below 1e-8 of the norm.
        """
        orthogonal = self.map(lambda core: core.double()).orthogonalise()
        nodes = self.tree.nodes
        root = orthogonal.core(self.tree.root)
        # What is above a node, seen from its frame: (rank, columns), orthogonal rows in the node's singular basis.
        above: dict[int, Tensor] = {self.tree.root.index: root.new_ones(1, 1)}
        bases: dict[int, Tensor] = {}
        spectra: dict[int, Tensor] = {self.tree.root.index: torch.linalg.vector_norm(root).reshape(1)}
        for node in reversed(self.tree.inner_nodes):
            weighted = orthogonal.core(node) @ above.pop(node.index)
            for side, child in enumerate(node.children or ()):
                vectors, values = left_singular(weighted.movedim(side, 0).flatten(1))
                keep = max(1, int((values > _WEIGHTLESS * values[0]).sum()))
                bases[child], spectra[child] = vectors[:, :keep], values[:keep]
                above[child] = bases[child] * spectra[child]
        cores = []
        for node in nodes:
            core = orthogonal.core(node)
            if node.children is not None:
                core = _turned(core, bases[node.children[0]].T, bases[node.children[1]].T)
            if node.parent is not None:
                core = core @ bases[node.index]
            cores.append(core.to(self.dtype))
        return HTTensor.from_cores(self.tree, cores), tuple(spectra[node.index] for node in nodes)

    def sliced(self, ranks: Sequence[int]) -> HTTensor:
        """The leading `ranks` of every core, with the root fitted anew.

        Meant for a tensor in canonical form: the squared error is then at most the sum over the edges of
        the squared singular values cut off (the two edges of the root count once).
        """
        wanted = [min(a, b) for a, b in zip(ranks, self.ranks, strict=True)]
        cores = []
        for node in self.tree.nodes:
            core = self.core(node)[..., : wanted[node.index]]
            if node.children is not None:
                core = core[: wanted[node.children[0]], : wanted[node.children[1]]]
            cores.append(core)
        part = HTTensor.from_cores(self.tree, cores).orthogonalise()
        if part.tree.order == 1:
            return part
        cross = part._cross(self)
        left, right = self.tree.root.children or (0, 0)
        root = _turned(self.core(self.tree.root), cross[left], cross[right])
        return HTTensor.from_cores(self.tree, [*(part.core(n) for n in self.tree.nodes[:-1]), root])

    def truncate(self, *, ranks: Sequence[int] | None = None, rtol: float | None = None) -> HTTensor:
        """The nearest tensor (up to sqrt(2d - 3)) of the given ranks, or within a relative error.

        Raises `RequestError` where the error is smaller than the cores' precision can hold.
        """
        form, spectra = self.map(lambda core: core.double()).canonical()
        if ranks is None:
            share = 0.0 if rtol is None else share_of_ranks(rtol, self.dtype, len(self.tree.nodes))
            ranks = ranks_for_error(self.tree, self.shape, spectra, (share * float(spectra[-1])) ** 2)
        return form.sliced(ranks).map(lambda core: core.to(self.dtype))

    # ---- storage -------------------------------------------------------------------------------------

    def compact(self) -> HTTensor:
        """The same tensor with every core that can be an identity absorbed by its neighbour.

        A full-rank leaf (r = n) and a full-rank inner node (r_t = r_left * r_right) move into their
        parent, the root moves into its children, half of it to each (a root of one number into any core):
        r^2 numbers less at each such edge, for nothing. `parameters` then equals `ranks.parameter_count`.
        """
        tree = self.tree
        if tree.order == 1:
            return self.expanded()
        cores = self.expanded().stored
        spared: set[int] = set()
        for node in tree.nodes[:-1]:
            core = cores[node.index]
            if core.numel() == core.shape[-1] ** 2:
                _absorb(cores, tree, node, core.reshape(-1, core.shape[-1]))
                spared.add(node.index)
        left, right = tree.root.children or (0, 0)
        root, top = cores[-1], tree.root.index
        if root.shape[0] == root.shape[1] and not {left, right} <= spared:
            if left in spared:
                cores[right] = cores[right] @ root[:, :, 0].T
            elif right in spared:
                cores[left] = cores[left] @ root[:, :, 0]
            elif not torch.equal(root[:, :, 0], torch.eye(len(root), dtype=root.dtype, device=root.device)):
                u, s, vh = torch.linalg.svd(root[:, :, 0])
                cores[left], cores[right] = cores[left] @ (u * s.sqrt()), cores[right] @ (vh.T * s.sqrt())
            spared.add(top)
        elif root.numel() == 1:
            kept = next((t for t in range(top) if t not in spared), None)
            if kept is not None:
                cores[kept] = cores[kept] * root.reshape(())
                spared.add(top)
        ranks = [self.ranks[n.index] for n in tree.nodes]
        made = [Identity(tuple(core.shape)) if t in spared else core for t, core in enumerate(cores)]
        compacted = HTTensor(tree, self.shape, tuple(ranks), tuple(made))
        promised = parameter_count(tree, self.shape, ranks)
        if compacted.parameters != promised:
            raise ShapeError(
                f"Ranks {tuple(ranks)} promise {promised} numbers; {compacted.parameters} would be stored."
            )
        return compacted

    def balance(self) -> HTTensor:
        """The same tensor, compact, with its weight spread evenly: a good start for training.

        At every edge both sides share the singular values, half of each on either side, so that no core is
        ill-conditioned for its neighbours' sake; then all stored cores get the same Frobenius norm.
        """
        form, spectra = self.map(lambda core: core.double()).canonical()
        balanced = self.expanded()
        if form.ranks == self.ranks and float(spectra[-1]) > 0:
            roots = [(values / values[0]).clamp_min(_LEAST_SHARE).sqrt() for values in spectra]
            cores = []
            for node in self.tree.nodes:
                core = form.core(node)
                if node.children is not None:
                    left, right = (roots[child] for child in node.children)
                    core = core / left[:, None, None] / right[None, :, None]
                cores.append(core if node.parent is None else core * roots[node.index])
            balanced = HTTensor.from_cores(self.tree, cores)
        return balanced.compact().equalise().map(lambda core: core.to(self.dtype))

    def equalise(self) -> HTTensor:
        """The same tensor with equal Frobenius norms in all stored cores; the bases stay what they are."""
        norms = [float(torch.linalg.vector_norm(core)) for core in self.stored]
        if min(norms) == 0.0:
            return self
        mean = prod(n ** (1 / len(norms)) for n in norms)
        return self.map(lambda core: core * (mean / torch.linalg.vector_norm(core)))

    def relative_error(self, x: Tensor) -> float:
        """||x - self|| / ||x||, by reconstruction; 0 where both are zero."""
        scale = float(torch.linalg.vector_norm(x.double()))
        error = float(torch.linalg.vector_norm(x.double() - self.dense().double()))
        return error / scale if scale else (0.0 if error == 0.0 else inf)


def _absorb(cores: list[Tensor], tree: DimensionTree, node: Node, factor: Tensor) -> None:
    """Multiply `factor` (new rank, old rank) into the parent's mode of `node`."""
    parent = tree.nodes[node.parent or 0]
    first = parent.children is not None and parent.children[0] == node.index
    cores[parent.index] = torch.einsum("ab,bcd->acd" if first else "ab,cbd->cad", factor, cores[parent.index])


def _turned(
    core: Float[Tensor, "l r t"], left: Float[Tensor, "a l"], right: Float[Tensor, "b r"]
) -> Float[Tensor, "a b t"]:
    """An inner core in other bases of its two children."""
    if core.shape[2] == 1:
        return (left @ core[:, :, 0] @ right.T).unsqueeze(-1)
    return right @ torch.tensordot(left, core, 1)

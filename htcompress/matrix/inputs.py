"""What enters a matrix: the second moment of its inputs, X^T X over the samples.

Kept as the samples themselves where they are far fewer than the columns, as a matrix where they are more. Several
matrices of a layer read the same inputs: they share them, centred or not, with inputs that are always 1 or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from htcompress.errors import ShapeError
from htcompress.matrix.blocks import DOUBLED, Block, Blocks, chunked_gram, in_range, thin_product
from htcompress.side_by_side import cached_property

_MODE_NUMBERS = 1 << 21
"""Numbers of samples that are folded at a time for a mode's moment: 16 MB in float64."""
_CONSTANT = 1e-12  # of the mean's square: what varies less, by a millionth of the mean, is constant but for rounding
CONSTANTS = 2
"""The most inputs that are always 1 behind the others: a GRU has two biases."""


class Inputs(ABC):
    """The inputs of a matrix, kind by kind of its columns.

    Attributes:
        cols: the columns.
        count: how many samples there were.
        centred: whether the mean is taken off.
    """

    cols: int
    count: int
    centred: bool

    @classmethod
    def of(cls, values: Float[Tensor, "n cols"] | Inputs) -> Inputs:
        """Inputs of one kind, as they are."""
        return values if isinstance(values, Inputs) else gather([values]).select(0)

    @abstractmethod
    def select(self, *kinds: int, constants: int = 0, centred: bool = False) -> Inputs:
        """Some of the kinds (the first few, or one), and inputs that are always 1 behind them."""

    @property
    @abstractmethod
    def mean(self) -> Float[Tensor, " cols"]:
        """The mean input, in float64, whether or not it is taken off."""

    @property
    @abstractmethod
    def trace(self) -> float:
        """The trace of X^T X."""

    @property
    @abstractmethod
    def square(self) -> float:
        """The squared norm of X^T X."""

    @abstractmethod
    def through(self, factor: Float[Tensor, "cols r"]) -> Float[Tensor, "cols r"]:
        """X^T X C, in the factor's precision."""

    @abstractmethod
    def output_gram(self, matrix: Blocks) -> Float[Tensor, "rows rows"]:
        """W X^T X W^T, in float64."""

    @abstractmethod
    def outputs(self, matrix: Blocks) -> Float[Tensor, "rows n"]:
        """W X^T, in float64, of samples that have the same second moment."""

    @abstractmethod
    def squared(self, chunks: Iterator[tuple[slice, Tensor]]) -> float:
        """||D X^T||^2 for a matrix D given as columns in float64 and which they are."""

    @property
    @abstractmethod
    def whole(self) -> Float[Tensor, "cols cols"]:
        """X^T X, in float64; for columns that are not too many."""

    @abstractmethod
    def some(self, most: int) -> Float[Tensor, "n cols"]:
        """At most so many rows Y, in float64, with Y^T Y = X^T X, or on the average so where there are more."""

    @abstractmethod
    def mode_moment(self, before: int, mode: int, after: int) -> Float[Tensor, "mode mode"]:
        """The second moment along the middle mode of inputs folded into (before, mode, after), padded with zeros."""


def gather(kinds: Sequence[Float[Tensor, "n _"]]) -> Inputs:
    """Kinds of inputs, sample by sample. Raises `ShapeError` where they are not equally many."""
    samples = len(kinds[0])
    if any(len(values) != samples for values in kinds):
        raise ShapeError(f"Kinds of inputs need as many samples each; found {[len(values) for values in kinds]}.")
    # A product by the moment takes as long as two by the samples.
    if 2 * samples < sum(values.shape[1] for values in kinds):
        return SampledInputs([Block(values.T) for values in kinds], samples)
    together = torch.cat(list(kinds), dim=1)
    narrow = together.numel() > DOUBLED and all(map(in_range, kinds))
    together = together.float() if narrow else together.double()
    sums = together.sum(0, dtype=torch.float64)
    together -= (sums / samples).to(together.dtype)
    # What is always 1 does not vary.
    moment = F.pad(chunked_gram(together.T), (0, CONSTANTS, 0, CONSTANTS))
    moment = moment.float() if narrow and moment.numel() > DOUBLED else moment
    sizes = [values.shape[1] for values in kinds]
    return MomentInputs(moment, F.pad(sums, (0, CONSTANTS), value=samples), sizes, samples)


class SampledInputs(Inputs):
    """Few samples beside the columns; each kind is a block (cols, n)."""

    def __init__(self, kinds: Sequence[Block], count: int, *, centred: bool = False) -> None:
        self.kinds, self.count, self.centred = tuple(kinds), count, centred
        self.cols = sum(kind.tensor.shape[0] for kind in kinds)

    def select(self, *kinds: int, constants: int = 0, centred: bool = False) -> Inputs:
        chosen = [self.kinds[kind] for kind in kinds]
        if constants:
            like = self.kinds[0].tensor
            chosen.append(Block(like.new_ones(constants, self.count)))
        return SampledInputs(chosen, self.count, centred=centred)

    @cached_property
    def mean(self) -> Float[Tensor, " cols"]:
        return torch.cat([kind.tensor.mean(1, dtype=torch.float64) for kind in self.kinds])

    @cached_property
    def gram(self) -> Float[Tensor, "n n"]:
        """X X^T, in float64."""
        gram = torch.stack([kind.inner for kind in self.kinds]).sum(0)
        return self._centre(self._centre(gram).T)

    @cached_property
    def trace(self) -> float:
        found, mean = float(self.gram.trace()), self.count * float(self.mean.square().sum())
        return found if not self.centred or found > _CONSTANT * mean else 0.0

    @property
    def square(self) -> float:
        return float(self.gram.square().sum())

    def _centre(self, outputs: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return outputs - outputs.mean(0) if self.centred else outputs

    def through(self, factor: Float[Tensor, "cols r"]) -> Float[Tensor, "cols r"]:
        pieces = zip(self.kinds, factor.split([kind.tensor.shape[0] for kind in self.kinds]), strict=True)
        seen = [thin_product(kind.work.T, piece.to(kind.work.dtype)).to(factor.dtype) for kind, piece in pieces]
        return self._transposed(self._centre(torch.stack(seen).sum(0)))

    def _transposed(self, seen: Float[Tensor, "n k"]) -> Float[Tensor, "cols k"]:
        """X^T Y; Y is centred where X is."""
        return torch.cat([thin_product(kind.work, seen.to(kind.work.dtype)).to(seen.dtype) for kind in self.kinds])

    def outputs(self, matrix: Blocks) -> Float[Tensor, "rows n"]:
        pairs = zip(matrix.parts, self.kinds, strict=True)
        return self._centre(torch.stack([block.times_block(kind) for block, kind in pairs]).sum(0).T).T

    def output_gram(self, matrix: Blocks) -> Float[Tensor, "rows rows"]:
        seen = self.outputs(matrix)
        return seen @ seen.T

    def squared(self, chunks: Iterator[tuple[slice, Tensor]]) -> float:
        seen = self.kinds[0].tensor.new_zeros((), dtype=torch.float64)
        for where, chunk in chunks:
            start = 0
            for kind in self.kinds:
                end = start + kind.tensor.shape[0]
                first, last = max(where.start, start), min(where.stop, end)
                if first < last:
                    inputs = kind.tensor[first - start : last - start].double()
                    seen = seen + chunk[:, first - where.start : last - where.start] @ inputs
                start = end
        return float(self._centre(seen.T).square().sum())

    @property
    def whole(self) -> Float[Tensor, "cols cols"]:
        seen = self._centre(torch.cat([kind.tensor.double() for kind in self.kinds]).T)
        return seen.T @ seen

    def some(self, most: int) -> Float[Tensor, "n cols"]:
        chosen = torch.randperm(self.count, generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:most]
        seen = torch.cat([kind.tensor[:, chosen.to(kind.tensor.device)].double() for kind in self.kinds]).T
        mean = self.mean if self.centred else 0.0
        return (seen - mean) * (self.count / len(chosen)) ** 0.5

    @cached_property
    def _mixed(self) -> tuple[Float[Tensor, "k cols"], float]:
        """A few rows that stand for all, and their unit: each holds cols / mode vectors of a mode, which is plenty."""
        rows = max(1, _MODE_NUMBERS // self.cols)
        if self.count <= rows:
            weights = torch.eye(self.count, dtype=torch.float32, device=self.kinds[0].tensor.device)
        else:
            generator = torch.Generator(device="cpu").manual_seed(0)
            signs = torch.randint(0, 2, (self.count, rows), generator=generator, dtype=torch.float32, device="cpu")
            weights = ((2 * signs - 1) / sqrt(rows)).to(self.kinds[0].tensor.device)
        mixed = self._transposed(self._centre(weights)).T
        # In a unit of their own: squares stay within the range of float32.
        unit = float(mixed.abs().max()) or 1.0
        return mixed / unit, unit

    def mode_moment(self, before: int, mode: int, after: int) -> Float[Tensor, "mode mode"]:
        mixed, unit = self._mixed
        padded = F.pad(mixed, (0, before * mode * after - self.cols))
        vectors = padded.reshape(-1, mode, after).movedim(1, 0).reshape(mode, -1)
        return (vectors @ vectors.T).double() * unit**2


class MomentInputs(Inputs):
    """Many samples beside the columns: their sums and the moment about their mean.

    `CONSTANTS` inputs that are always 1 stand behind all kinds. Kept about the mean, since the difference of a moment
    and its mean's is rounding where the mean is large.
    """

    def __init__(
        self, moment: Float[Tensor, "c c"], sums: Float[Tensor, " c"], sizes: Sequence[int], count: int
    ) -> None:
        self.moment, self.sums, self.sizes, self.count = moment, sums, list(sizes), count
        self.centred, self.cols = False, len(moment)

    def select(self, *kinds: int, constants: int = 0, centred: bool = False) -> Inputs:
        start = sum(self.sizes[: kinds[0]])
        stop = sum(self.sizes[: kinds[-1] + 1]) + constants
        where = slice(start, stop)
        chosen = MomentInputs(self.moment[where, where], self.sums[where], [stop - start], self.count)
        chosen.centred = centred
        return chosen

    @property
    def mean(self) -> Float[Tensor, " cols"]:
        return self.sums / self.count

    @cached_property
    def trace(self) -> float:
        found, mean = float(self.moment.diagonal().sum(dtype=torch.float64)), self._mean_square
        if not self.centred:
            return found + mean
        return found if found > _CONSTANT * mean else 0.0

    @property
    def _mean_square(self) -> float:
        """The squared norm of the mean, once for each sample."""
        return float(self.sums.square().sum()) / self.count

    @cached_property
    def square(self) -> float:
        found = float(torch.linalg.vector_norm(self.moment, dtype=torch.float64)) ** 2
        if not self.centred:
            # ||C + s s^T / n||^2.
            along = float(self.sums @ (self.moment @ self.mean.to(self.moment.dtype)).double())
            found += self._mean_square**2 + 2 * along
        return found

    def through(self, factor: Float[Tensor, "cols r"]) -> Float[Tensor, "cols r"]:
        product = thin_product(self.moment, factor.to(self.moment.dtype)).to(factor.dtype)
        if not self.centred:
            mean = self.mean.to(factor.dtype)
            product = product + torch.outer(mean, (self.sums.to(factor.dtype) @ factor))
        return product

    def output_gram(self, matrix: Blocks) -> Float[Tensor, "rows rows"]:
        weights = matrix.dense().to(self.moment.dtype)
        return (weights @ self.through(weights.T)).double()

    @property
    def whole(self) -> Float[Tensor, "cols cols"]:
        moment = self.moment.to(torch.float64, copy=True)
        return moment if self.centred else moment + torch.outer(self.sums, self.mean)

    @cached_property
    def _root(self) -> Float[Tensor, "cols n"]:
        """L with L L^T = X^T X, up to rounding, whatever the rank."""
        values, vectors = torch.linalg.eigh(self.whole)
        return vectors * values.clamp_min(0).sqrt()

    def outputs(self, matrix: Blocks) -> Float[Tensor, "rows n"]:
        return matrix.times(self._root)

    def some(self, most: int) -> Float[Tensor, "n cols"]:
        if self.cols <= most:
            return self._root.T
        generator = torch.Generator("cpu").manual_seed(0)
        signs = torch.randint(0, 2, (self.cols, most), generator=generator, dtype=torch.float64, device="cpu")
        factor = self._cholesky
        return (factor @ ((2 * signs - 1) / sqrt(most)).to(factor.device)).T

    @cached_property
    def _cholesky(self) -> Float[Tensor, "cols cols"]:
        """L as `_root`, found faster, and exact to a millionth of the mean eigenvalue."""
        moment = self.whole
        moment += 1e-6 * moment.diagonal().mean() * torch.eye(self.cols, dtype=torch.float64, device=moment.device)
        factor, _ = torch.linalg.cholesky_ex(moment)
        return factor

    def squared(self, chunks: Iterator[tuple[slice, Tensor]]) -> float:
        difference = torch.cat([chunk for _, chunk in chunks], dim=1)
        return float((difference * self.through(difference.T).T).sum())

    def mode_moment(self, before: int, mode: int, after: int) -> Float[Tensor, "mode mode"]:
        # Whole slabs as they lie, then what is left over, which ends somewhere in its slab.
        slab = mode * after
        whole = self.cols // slab * slab
        moment = _partial_trace(self.moment[:whole, :whole], mode, after)
        if whole < self.cols:
            moment = moment + _unfinished_trace(self.moment[whole:, whole:], mode, after)
        if not self.centred:
            mean = F.pad(self.mean, (0, before * slab - self.cols)).reshape(before, mode, after)
            moment = moment + self.count * torch.einsum("aib,ajb->ij", mean, mean)
        return moment


def _partial_trace(moment: Float[Tensor, "c c"], mode: int, after: int) -> Float[Tensor, "mode mode"]:
    folded = moment.unflatten(1, (-1, mode, after)).unflatten(0, (-1, mode, after))
    return torch.einsum("aibajb->ij", folded).double()


def _unfinished_trace(moment: Float[Tensor, "c c"], mode: int, after: int) -> Float[Tensor, "mode mode"]:
    """`_partial_trace` of less than one slab, as if it were padded with zeros; nothing is copied for it."""
    full, rest = divmod(len(moment), after)
    made = torch.zeros(mode, mode, dtype=torch.float64, device=moment.device)
    end = full * after
    made[:full, :full] = _partial_trace(moment[:end, :end], full, after) if full else 0.0
    if rest:
        beside = moment[:end, end:].unflatten(0, (full, after))[:, :rest].diagonal(dim1=1, dim2=2).sum(1)
        made[:full, full] = made[full, :full] = beside.double()
        made[full, full] = moment[end:, end:].diagonal().sum().double()
    return made

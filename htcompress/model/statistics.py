"""Statistics of recurrent layers on calibration data: what enters each matrix, and what its output does.

One forward and one backward pass for each calibration batch. No labels: the backward pass starts from a random
projection of the model's output, so that E[delta delta^T] is the second moment of its Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import frexp
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from htcompress.errors import TaskError
from htcompress.matrix.metric import EXACT_LIMIT, shrinkage_of
from htcompress.model.inventory import check_parameters
from htcompress.model.replace import dense_stand_ins, recurrent_modules, stand_ins, with_stand_ins
from htcompress.model.threads import ThreadsForRuns
from htcompress.nn.gates import GateWeights
from htcompress.nn.states import cut_off
from htcompress.nn.watched import Passage
from htcompress.side_by_side import cached_property
from htcompress.spread import units_of
from htcompress.values import answers_in, call, fresh, tensors_of

SAMPLE_NUMBERS = 1 << 24
"""How many numbers of inputs are kept for each layer and direction (64 MB)."""

_BLOCK = 256
"""Rows of a second moment that are summed up at a time."""

_FEW = 10
"""Numbers that enter a matrix, for each time step that was seen, beyond which that is told."""


@dataclass
class DirectionStatistics:
    """What was seen of one layer and direction.

    Attributes:
        inputs: (samples, inputs + state) x and h side by side, for time steps drawn evenly at random.
        gradients_ih: second moment of the gradients at W_ih x, summed over time steps and divided by the
            number of batches: (rows, rows), or its diagonal (rows,) where rows exceed `EXACT_LIMIT`.
        gradients_hh: the same at W_hh h; differs from the former in a GRU only.
        steps: of how many gradients; 0: enough.
        reached: whether there were any; else both stand for errors that count as much as those of other layers.
    """

    inputs: Float[Tensor, "samples columns"]
    gradients_ih: Tensor
    gradients_hh: Tensor
    steps: int = 0
    reached: bool = True

    @cached_property
    def weights_ih(self) -> Tensor:
        """What errors at W_ih x are weighed by: their gradients' second moment, shrunk as few of them ask for."""
        return _shrunk(self.gradients_ih, self.steps)

    @cached_property
    def weights_hh(self) -> Tensor:
        """The same at W_hh h; one tensor where they are the same."""
        return self.weights_ih if self.gradients_hh is self.gradients_ih else _shrunk(self.gradients_hh, self.steps)

    def reordered(self, *, rows: Tensor | None = None, columns: Tensor | None = None) -> DirectionStatistics:
        """The same with rows of the matrices, or columns of the inputs, in another order."""
        inputs = self.inputs if columns is None else self.inputs[:, columns]
        if rows is None:
            return replace(self, inputs=inputs)
        at = rows

        def moved(moment: Tensor) -> Tensor:
            return moment[at] if moment.ndim == 1 else moment[at][:, at]

        ih = moved(self.gradients_ih)
        hh = ih if self.gradients_hh is self.gradients_ih else moved(self.gradients_hh)
        return replace(self, inputs=inputs, gradients_ih=ih, gradients_hh=hh)


@dataclass
class _Reservoir:
    """A uniform sample of bounded size from a stream of rows (algorithm R, by blocks)."""

    generator: torch.Generator
    seen: int = 0
    _buffer: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """The sample."""
        return None if self._buffer is None else self._buffer[: self.seen]

    def add(self, block: Tensor) -> None:
        block = block.detach().float().cpu()
        limit = max(64, SAMPLE_NUMBERS // block.shape[1])
        if self._buffer is None:
            # Memory that is not written to is not taken.
            self._buffer = block.new_empty(limit, block.shape[1])
        head, tail = block[: max(0, limit - self.seen)], block[max(0, limit - self.seen) :]
        self._buffer[self.seen : self.seen + len(head)] = head
        self.seen += len(head)
        if len(tail):
            position = torch.arange(self.seen + 1, self.seen + len(tail) + 1, device="cpu")
            place = (
                torch.rand(len(tail), generator=self.generator, dtype=torch.float32, device="cpu") * position
            ).long()
            kept = place < limit
            self._buffer[place[kept]] = tail[kept]
            self.seen += len(tail)


@dataclass
class _Gathered:
    """The running sums of one direction; `hh` is None as long as it is what `ih` is.

    Attributes:
        unreached: what has entered where no gradient has come back.
        rows: of the gates.
        steps: how many gradients there were.
        energy: the sum of the squares of W_ih x, over these and the others, and of how many numbers.
    """

    reservoir: _Reservoir
    unreached: _Reservoir
    rows: int
    ih: Tensor | None = None
    hh: Tensor | None = None
    steps: int = 0
    energy: float = 0.0
    numbers: int = 0

    def saw(self, z: Tensor) -> None:
        self.energy += float(z.detach().float().square().sum())
        self.numbers += z.numel()

    def add(self, inputs: Tensor, delta_ih: Tensor, delta_hh: Tensor) -> None:
        self.reservoir.add(inputs)
        self.steps += len(delta_ih)
        self.ih = _with_moment(self.ih, delta_ih)
        if delta_hh is not delta_ih:
            self.hh = _with_moment(self.hh, delta_hh)

    def moments(self, count: int) -> tuple[Tensor, Tensor]:
        """The mean over so many batches of both; one tensor where they are the same."""
        if self.ih is None:
            raise RuntimeError("Nothing was gathered yet.")
        ih = _whole(self.ih) / count
        return ih, ih if self.hh is None else _whole(self.hh) / count

    @property
    def effect(self) -> float:
        """The squared effect that W_ih x has on what is put out, as if gradients knew nothing of it."""
        if self.ih is None:
            return 0.0
        trace = float(self.ih.diagonal().sum() if self.ih.ndim == 2 else self.ih.sum())
        return trace * self.energy / max(1, self.numbers)

    def standing(self, effect: float, count: int) -> DirectionStatistics | None:
        """What was seen; `effect` is the mean of those that gradients have reached. None where nothing has entered."""
        if self.reservoir.rows is not None:
            return DirectionStatistics(self.reservoir.rows, *self.moments(count), self.steps)
        rows = self.unreached.rows
        if rows is None:
            return None
        size, mean = self.rows, self.energy / max(1, self.numbers)
        alike = torch.ones(size, dtype=torch.float64) * (effect / count / (size * mean) if mean > 0 else 1.0)
        weights = alike if size > EXACT_LIMIT else alike.diag()
        return DirectionStatistics(rows, weights, weights, reached=False)


def _shrunk(moment: Tensor, count: int) -> Tensor:
    """A second moment of so many gradients with a part of the identity in its place: few of them span few rows."""
    if moment.ndim == 1 or not count:
        return moment
    rows, trace, square = len(moment), float(moment.diagonal().sum()), float(moment.square().sum())
    amount = shrinkage_of(count, rows, trace, square)
    found = moment * (1 - amount)
    found.diagonal().add_(amount * trace / rows)
    return found


def _whole(moment: Tensor) -> Tensor:
    """A second moment of which what stands above the diagonal's blocks was left out."""
    return moment if moment.ndim == 1 else moment.tril() + moment.tril(-1).T


def _with_moment(total: Tensor | None, delta: Tensor) -> Tensor:
    """The sum of second moments, in place: memory is not asked for anew with every batch.

    What is symmetric is summed up below the diagonal's blocks alone; `_whole` has the rest.
    """
    delta = delta.detach()
    if delta.shape[1] > EXACT_LIMIT:
        square = delta.double().square().sum(0).cpu()
        return square if total is None else total.add_(square)
    # In the model's precision, in a unit of its own: rounding is far below what a sample of data tells.
    wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
    unit = 2.0 ** frexp(float(wide.abs().amax()) if wide.numel() else 0.0)[1]
    scaled = wide / unit
    size = scaled.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64, device="cpu") if total is None else total
    for start in range(0, size, _BLOCK):
        rows, end = slice(start, start + _BLOCK), start + _BLOCK
        total[rows, :end].add_((scaled[:, rows].T @ scaled[:, :end]).cpu(), alpha=unit**2)
    return total


def collect(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    *,
    names: Iterable[str] | None = None,
    tied: Mapping[str, str] | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, dict[str, DirectionStatistics]]:
    """Run calibration batches through a model and gather the statistics of its recurrent layers.

    Args:
        model: the trained dense model; it is not changed.
        batches: the arguments of the model, batch by batch; nothing but running sums and a bounded sample is kept
            of them.
        names: which recurrent modules (all if None).
        tied: modules that share all weights with another, by name; what they see counts for that.
        seed: of the random projections and of the sample.
        on_batch: called with the number of batches done, for progress.

    Returns:
        by module name, then by direction (`l0`, `l0_reverse`, ...; `cell`), what was seen. A module through which
        nothing passed is not in it.

    Raises:
        TaskError: there are no batches, one brings what is not finite into a layer, or the output has nothing a
            gradient could start from.
    """
    owners = dict(tied or {})
    chosen = list(recurrent_modules(model)) if names is None else list(names)
    passages: list[tuple[str, Passage]] = []
    probed = with_stand_ins(model, dense_stand_ins(model, [*chosen, *owners]), shared=True)
    probed.eval().requires_grad_(False)
    gates: dict[str, Mapping[str, GateWeights]] = {}
    for name, module in stand_ins(probed).items():
        owner = owners.get(name, name)
        module.watch = lambda passage, owner=owner: passages.append((owner, passage))
        gates[owner] = module.directions()
    generator = torch.Generator().manual_seed(seed)
    gathered: dict[str, dict[str, _Gathered]] = {}
    count = 0
    units: list[Tensor | None] = []
    threads = ThreadsForRuns()
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        for arguments in batches:
            passages.clear()
            count += 1
            with threads():
                output = call(probed, fresh(arguments))
                # Where nothing passed through a layer, its output may owe it nothing.
                if passages:
                    parts = _reached(output)
                    units = units_of(parts) if len(units) != len(parts) else units
                    _projected(parts, units, generator).backward()
            with threads.told():
                for name, passage in passages:
                    if not _added(gathered.setdefault(name, {}), passage, gates[name], generator):
                        check_parameters(model, "The model")
                        raise TaskError(_not_finite(count, arguments, name or "the model"))
            cut_off(probed)
            if on_batch is not None:
                on_batch(count)
    if count == 0:
        raise TaskError("calibration() yields nothing; it must yield at least one batch of the model's input.")
    effects = [g.effect for directions in gathered.values() for g in directions.values() if g.effect > 0]
    mean = sum(effects) / max(1, len(effects))
    seen = {
        name: {direction: g.standing(mean, count) for direction, g in directions.items()}
        for name, directions in gathered.items()
    }
    return {name: {d: own for d, own in directions.items() if own is not None} for name, directions in seen.items()}


def remarks(found: Mapping[str, Mapping[str, DirectionStatistics]]) -> list[str]:
    """What is to be known of statistics that tell less than others: one sentence for each kind, and layer."""
    told = []
    for name, directions in found.items():
        # Of many steps the inputs are a sample.
        steps, columns = next(((s.steps or len(s.inputs), s.inputs.shape[1]) for s in directions.values()), (1, 0))
        if _FEW * steps < columns:
            told.append(
                f"The calibration data has {steps} time steps for the {columns:,} numbers that enter "
                f"{name or 'the model'}: what else may enter counts as if all of it were alike. More data tells more."
            )
        if any(not s.reached for s in directions.values()):
            told.append(
                f"No gradient comes back to {name or 'the model'} (torch.no_grad or detach in forward?): its matrices "
                f"are weighed by what enters them, and count as much as those of other layers."
            )
    return told


def _added(
    directions: dict[str, _Gathered], passage: Passage, gates: Mapping[str, GateWeights], generator: torch.Generator
) -> bool:
    """Add what passed through a direction to its sums; whether it was finite."""
    own = gates[passage.direction]
    if passage.direction not in directions:
        apart = _Reservoir(generator), _Reservoir(torch.Generator().manual_seed(0))
        directions[passage.direction] = _Gathered(*apart, own.settings.rows)
    gathered = directions[passage.direction]
    gathered.saw(passage.z)
    inputs, *deltas = _flat(own, passage)
    if not bool(torch.isfinite(inputs).all()):
        return False
    if not deltas:
        if gathered.ih is None:
            gathered.unreached.add(inputs)
    else:
        gathered.add(inputs, *deltas)
    return True


def _not_finite(count: int, arguments: Sequence[Any], name: str) -> str:
    """What is said of a batch with which numbers that are not finite come into a layer."""
    if all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(tuple(arguments))):
        return (
            f"With batch {count} of calibration() the model puts numbers that are not finite into {name}, though the "
            f"batch is. Leave it out, or correct what comes before {name}."
        )
    return f"Batch {count} of calibration() brings numbers that are not finite into {name}. Leave them out."


def _reached(output: Any) -> list[Tensor]:
    """The tensors of an output that depend on what passed through the layers."""
    parts = [t for t in answers_in(output) if t.requires_grad]
    if not parts:
        raise TaskError(
            "The model's output does not depend on its recurrent layers by gradients, so calibration "
            "cannot weigh them. Return the logits or states from the model, not decoded symbols."
        )
    return parts


def _projected(parts: Sequence[Tensor], units: Sequence[Tensor | None], generator: torch.Generator) -> Tensor:
    """A random projection of outputs in their units; its scale is per batch item: layers and batches compare."""
    terms = []
    for part, unit in zip(parts, units, strict=True):
        # In half precision the sum would overflow; what is masked by infinities has no gradient.
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        signs = torch.randn(part.shape, generator=generator, dtype=torch.float32, device="cpu")
        if unit is not None:
            # Where channels are as many as time steps, they are others in every batch.
            signs = signs / (unit if part.ndim and len(unit) == part.shape[-1] else unit.median())
        signs = signs.to(wide)
        terms.append((torch.where(torch.isfinite(wide), wide, 0.0) * signs).sum())
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


def _flat(gates: GateWeights, passage: Passage) -> list[Tensor]:
    """What has entered, step by step, and the gradients at W_ih x and W_hh h; without these where none came back."""
    settings = gates.settings
    x = passage.x.detach().reshape(-1, passage.x.shape[-1])
    h = passage.h.detach().reshape(-1, passage.h.shape[-1])
    dense = gates.resolve()
    z = passage.z.detach().reshape(-1, settings.rows)
    read = settings.recurrence.state_inputs(z, h, dense.hh, dense.bias_ih)
    inputs = torch.cat([x, read], dim=1)
    if passage.z.grad is None:
        return [inputs]
    delta = torch.nan_to_num(passage.z.grad.reshape(-1, settings.rows), 0.0, 0.0, 0.0)
    return [inputs, delta, settings.recurrence.state_gradients(delta, z, h, dense.hh, dense.bias_ih)]

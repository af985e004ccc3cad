"""Statistics of recurrent layers on calibration data: what enters each matrix, and what its output does.

One forward and one backward pass for each calibration batch. No labels: the backward pass starts from a random
projection of the model's output, so that E[delta delta^T] is the second moment of its Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from htcompress.errors import TaskError
from htcompress.matrix.metric import EXACT_LIMIT
from htcompress.nn.dense import DenseSlot
from htcompress.nn.kernel import run_layer
from htcompress.nn.recurrent import HTCell, HTLayers, HTRecurrent, module_class
from htcompress.nn.replace import recurrent_modules, replace_modules
from htcompress.nn.settings import Kind, RecurrentSettings
from htcompress.nn.stepwise import State
from htcompress.nn.weights import GateWeights, KernelWeights

SAMPLE_NUMBERS = 1 << 24
"""How many numbers of inputs are kept for each layer and direction (64 MB)."""


@dataclass
class SlotStatistics:
    """What was seen of one layer and direction.

    Attributes:
        inputs: (samples, inputs + state) x and h side by side, for time steps drawn evenly at random.
        gradients_ih: second moment of the gradients at W_ih x, summed over time steps and divided by the
            number of batches: (rows, rows), or its diagonal (rows,) where rows exceed `EXACT_LIMIT`.
        gradients_hh: the same at W_hh h; differs from the former in a GRU only.
    """

    inputs: Float[Tensor, "samples columns"]
    gradients_ih: Tensor
    gradients_hh: Tensor


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
            position = torch.arange(self.seen + 1, self.seen + len(tail) + 1)
            slot = (torch.rand(len(tail), generator=self.generator) * position).long()
            kept = slot < limit
            self._buffer[slot[kept]] = tail[kept]
            self.seen += len(tail)


@dataclass
class _Gathered:
    """The running sums of one slot."""

    reservoir: _Reservoir
    ih: Tensor | float = 0.0
    hh: Tensor | float = 0.0

    def add(self, inputs: Tensor, delta_ih: Tensor, delta_hh: Tensor) -> None:
        self.reservoir.add(inputs)
        self.ih = self.ih + _moment(delta_ih)
        self.hh = self.ih if delta_hh is delta_ih else self.hh + _moment(delta_hh)


def _moment(delta: Tensor) -> Tensor:
    delta = delta.detach().double()
    return (delta.square().sum(0) if delta.shape[1] > EXACT_LIMIT else delta.T @ delta).cpu()


@dataclass
class _Step:
    """One pass through one slot, kept until the backward pass has filled `z.grad`."""

    slot: str
    x: Tensor
    h: Tensor
    z: Tensor
    rows: Tensor | None
    """Which rows of x and h are time steps (None: all), where padding stands between."""


class _Probed(HTLayers):
    """A dense recurrent layer that keeps what passes through it, and lets gradients through."""

    kinds = tuple(Kind)
    record: Callable[[_Step], None]

    def _run(self, x: Tensor, batch_sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
        s = self.settings
        slots = list(self.slots().items())
        last = []
        for layer in range(s.num_layers):
            span = slice(layer * s.directions, (layer + 1) * s.directions)
            parts, weights = [], []
            for index, (_, gates) in enumerate(slots[span]):
                dense = gates.resolve()
                assert dense.ih is not None
                z = _watched(torch.nn.functional.linear(x, dense.ih))
                parts.append(z)
                blocks = [z.new_zeros(s.rows, s.rows) for _ in range(s.directions)]
                blocks[index] = torch.eye(s.rows, dtype=z.dtype, device=z.device)
                weights.append(
                    KernelWeights(None, torch.cat(blocks, 1), dense.hh, dense.bias_ih, dense.bias_hh, dense.hr)
                )
            first = tuple(t[span].contiguous() for t in state)
            out, after = run_layer(s.kind, torch.cat(parts, dim=-1), batch_sizes, first, weights)
            for index, (name, _) in enumerate(slots[span]):
                own = out[..., index * s.state_size : (index + 1) * s.state_size]
                before, rows = _previous(own, first[0][index], batch_sizes, reverse=index == 1)
                self.record(_Step(name, x, before, parts[index], rows))
            x = out
            last.append(after)
        return x, tuple(torch.cat(parts) for parts in zip(*last, strict=True))


class _ProbedCell(HTCell):
    """A dense recurrent cell that keeps what passes through it."""

    kinds = tuple(Kind)
    record: Callable[[_Step], None]

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        from htcompress.nn.kernel import run_cell

        s = self.settings
        batch = tuple(input.shape[:-1])
        state = self._zeros(input, *batch) if hx is None else self._given(hx, batch)
        if input.ndim == 1:
            input, state = input.unsqueeze(0), tuple(t.unsqueeze(0) for t in state)
        ((name, gates),) = self.slots().items()
        dense = gates.resolve()
        assert dense.ih is not None
        z = _watched(torch.nn.functional.linear(input, dense.ih))
        eye = torch.eye(s.rows, dtype=z.dtype, device=z.device)
        weights = KernelWeights(None, eye, dense.hh, dense.bias_ih, dense.bias_hh, None)
        self.record(_Step(name, input, state[0], z, None))
        after = run_cell(s.kind, z, state, weights)
        return self._as_torch(after if batch else tuple(t.squeeze(0) for t in after))


def _watched(z: Tensor) -> Tensor:
    if not z.requires_grad:
        z.requires_grad_()
    z.retain_grad()
    return z


def _previous(out: Tensor, first: Tensor, batch_sizes: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor | None]:
    """The state that each time step started from, laid out like `out`."""
    if batch_sizes is None:
        shifted = [out[1:], first.unsqueeze(0)] if reverse else [first.unsqueeze(0), out[:-1]]
        return torch.cat(shifted), None
    sizes = batch_sizes.tolist()
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    blocks = []
    for t, size in enumerate(sizes):
        if not reverse:
            blocks.append(first[:size] if t == 0 else out[starts[t - 1] : starts[t - 1] + size])
        else:
            # A sequence that ends here starts, backwards, from its initial state.
            going_on = sizes[t + 1] if t + 1 < len(sizes) else 0
            blocks += [out[starts[t] + size : starts[t] + size + going_on], first[going_on:size]]
    return torch.cat(blocks), None


def collect(
    model: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    *,
    names: Iterable[str] | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, dict[str, SlotStatistics]]:
    """Run calibration batches through a model and gather the statistics of its recurrent layers.

    Args:
        model: the trained dense model; it is copied, not changed.
        batches: the positional arguments of the model, batch by batch; nothing but running sums and a
            bounded sample is kept of them.
        names: which recurrent modules (all if None).
        seed: of the random projections and of the sample.
        on_batch: called with the number of batches done, for progress.

    Returns:
        by module name, then by slot (`l0`, `l0_reverse`, ...; `cell`), what was seen.

    Raises:
        TaskError: there are no batches, or the output has nothing a gradient could start from.
    """
    chosen = None if names is None else set(names)
    wanted = {n: m for n, m in recurrent_modules(model).items() if chosen is None or n in chosen}
    steps: list[tuple[str, _Step]] = []
    probes: dict[str, HTRecurrent] = {}
    for name, module in wanted.items():
        settings = RecurrentSettings.of(module)
        dense = DenseSlot.read_all(settings, dict(module.named_parameters()))
        matrices = [replace(slot.matrices(), shared=True) for slot in dense]
        dropin = module_class(settings).from_matrices(settings, matrices)
        probe: Any = (_ProbedCell if settings.cell else _Probed)(settings, list(dropin.slots().values()))
        probe.record = lambda step, name=name: steps.append((name, step))
        probes[name] = probe
    probed = replace_modules(model, probes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    gathered: dict[str, dict[str, _Gathered]] = {}
    count = 0
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        for arguments in batches:
            steps.clear()
            output = probed(*arguments)
            # A random projection; its scale is per batch item, so that layers and batches compare.
            parts = [t for t in tensors_of(output) if t.requires_grad]
            if not parts:
                raise TaskError(
                    "The model's output does not depend on its recurrent layers by gradients, so calibration "
                    "cannot weigh them. Return the logits or states from the model, not decoded symbols."
                )
            projection = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in parts if t.numel())
            assert isinstance(projection, Tensor)
            projection.backward()
            count += 1
            for name, step in steps:
                slots = gathered.setdefault(name, {})
                if step.slot not in slots:
                    slots[step.slot] = _Gathered(_Reservoir(generator))
                if step.z.grad is not None:
                    slots[step.slot].add(*_flat(probes[name].slots()[step.slot], step))
            if on_batch is not None:
                on_batch(count)
    if count == 0:
        raise TaskError("calibration() yields nothing; it must yield at least one batch of the model's input.")
    return {
        name: {
            slot: SlotStatistics(g.reservoir.rows, g.ih / count, g.hh / count)  # type: ignore[arg-type]
            for slot, g in slots.items()
            if g.reservoir.rows is not None
        }
        for name, slots in gathered.items()
    }


def _flat(gates: GateWeights, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
    settings = gates.settings
    x = step.x.detach().reshape(-1, step.x.shape[-1])
    h = step.h.detach().reshape(-1, step.h.shape[-1])
    assert step.z.grad is not None
    delta = step.z.grad.reshape(-1, settings.rows)
    delta_hh = delta
    if settings.kind is Kind.GRU:
        # n = tanh(W_in x + r * (W_hn h + b_hn)): the hidden part sees the gradient through the reset gate.
        size = settings.hidden_size
        dense = gates.resolve()
        reset = step.z.detach().reshape(-1, settings.rows)[:, :size] + h @ dense.hh[:size].T
        if dense.bias_ih is not None:
            reset = reset + dense.bias_ih[:size]
        delta_hh = torch.cat([delta[:, : 2 * size], delta[:, 2 * size :] * torch.sigmoid(reset)], dim=1)
    return torch.cat([x, h], dim=1), delta, delta_hh


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a model's output, through tuples, lists, dicts and packed sequences."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)

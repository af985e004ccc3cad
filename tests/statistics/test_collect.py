"""The statistics equal explicit sums over a time loop written out by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from htcompress.errors import TaskError
from htcompress.statistics import collect as module
from htcompress.statistics.collect import SlotStatistics, collect

INPUTS, HIDDEN = 5, 4
LENGTHS = (6, 3, 4)


class Explicit:
    """A recurrent layer of torch as a loop over single sequences, every pre-activation a leaf for gradients."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.seen: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """One sequence (time, features) to the last layer's outputs (time, directions * state)."""
        directions = 2 if self.layer.bidirectional else 1
        for number in range(self.layer.num_layers):
            sides = []
            for direction in range(directions):
                slot = f"l{number}{'_reverse' if direction else ''}"
                steps = range(len(x)) if not direction else reversed(range(len(x)))
                sides.append(self._direction(x, slot, list(steps)))
            x = torch.cat(sides, dim=1)
        return x

    def _direction(self, x: Tensor, slot: str, steps: list[int]) -> Tensor:
        p = {name: getattr(self.layer, f"{name}_{slot}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        h, c, out = x.new_zeros(HIDDEN), x.new_zeros(HIDDEN), {}
        for t in steps:
            zx = p["weight_ih"] @ x[t]
            zh = p["weight_hh"] @ h
            for z in (zx, zh):
                z.retain_grad()
            self.seen.setdefault(slot, []).append((x[t].detach(), h.detach(), zx, zh))
            a, b = zx + p["bias_ih"], zh + p["bias_hh"]
            if isinstance(self.layer, nn.LSTM):
                i, f, g, o = (a + b).chunk(4)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif isinstance(self.layer, nn.GRU):
                (ra, za, na), (rb, zb, nb) = a.chunk(3), b.chunk(3)
                n = torch.tanh(na + torch.sigmoid(ra + rb) * nb)
                z = torch.sigmoid(za + zb)
                h = (1 - z) * n + z * h
            else:
                h = torch.tanh(a + b)
            out[t] = h
        return torch.stack([out[t] for t in range(len(x))])


def batch(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, INPUTS, generator=generator) for length in LENGTHS]


def explicit_sums(layer: nn.Module, batches: list[list[Tensor]], *, packed: bool) -> dict[str, SlotStatistics]:
    """What `collect` should find, for the same random projections of the packed or stacked output."""
    generator = torch.Generator().manual_seed(0)
    loop = Explicit(layer)
    for sequences in batches:
        outputs = [loop(x) for x in sequences]
        last = pack_sequence(outputs, enforce_sorted=False).data if packed else torch.stack(outputs)
        (last * torch.randn(last.shape, generator=generator)).sum().backward()
    found = {}
    for slot, steps in loop.seen.items():
        inputs = torch.stack([torch.cat([x, h]) for x, h, _, _ in steps])
        ih, hh = (torch.stack([step[k].grad for step in steps]).double() for k in (2, 3))
        found[slot] = SlotStatistics(inputs, ih.T @ ih / len(batches), hh.T @ hh / len(batches))
    return found


class Outputs(nn.Module):
    """A recurrent layer whose outputs alone are the model's output."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        out = self.rnn(x)[0]
        return out.data if isinstance(out, PackedSequence) else out


def as_set(rows: Tensor) -> Tensor:
    """Rows in an order of their own, so that two sets of rows compare."""
    order = sorted(range(len(rows)), key=lambda i: [round(v, 4) for v in rows[i].tolist()])
    return rows[order]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_equals_explicit_sums(kind: type[nn.Module], bidirectional: bool, packed: bool) -> None:
    layer = kind(INPUTS, HIDDEN, num_layers=2, bidirectional=bidirectional, batch_first=True)
    batches = [batch(seed) for seed in (1, 2)]
    if not packed:
        batches = [[x[: min(LENGTHS)] for x in sequences] for sequences in batches]
    expected = explicit_sums(layer, batches, packed=packed)
    given = (
        (pack_sequence(sequences, enforce_sorted=False) if packed else torch.stack(sequences),) for sequences in batches
    )
    found = collect(Outputs(layer), given)["rnn"]
    assert found.keys() == expected.keys()
    for slot, want in expected.items():
        assert torch.allclose(as_set(found[slot].inputs), as_set(want.inputs), atol=1e-5)
        for name in ("gradients_ih", "gradients_hh"):
            a, b = getattr(found[slot], name), getattr(want, name)
            assert torch.linalg.norm(a - b) <= 1e-5 * torch.linalg.norm(b)


class Stepping(nn.Module):
    """A cell called step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, dim=1)


@pytest.mark.parametrize(("kind", "whole"), [(nn.LSTMCell, nn.LSTM), (nn.GRUCell, nn.GRU), (nn.RNNCell, nn.RNN)])
def test_cells_equal_layers(kind: type[nn.Module], whole: type[nn.Module]) -> None:
    layer, cell = whole(INPUTS, HIDDEN, batch_first=True), kind(INPUTS, HIDDEN)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = torch.stack([sequence[:3] for sequence in batch(1)])
    one = collect(Stepping(cell), [(x,)])["cell"]["cell"]
    other = collect(Outputs(layer), [(x,)])["rnn"]["l0"]
    assert torch.allclose(as_set(one.inputs), as_set(other.inputs), atol=1e-5)
    for name in ("gradients_ih", "gradients_hh"):
        assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-6)


def test_the_model_is_left_alone_and_batches_stream() -> None:
    model = Outputs(nn.GRU(INPUTS, HIDDEN, batch_first=True)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    alive = []

    def stream() -> Iterator[tuple[Tensor]]:
        for seed in range(3):
            alive.append(seed)
            yield (torch.stack([x[:3] for x in batch(seed)]),)

    counted: list[int] = []
    collect(model, stream(), on_batch=counted.append)
    assert counted == [1, 2, 3] == [seed + 1 for seed in alive]
    assert model.training
    assert isinstance(model.rnn, nn.GRU)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_sample_is_bounded_and_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_NUMBERS", 200 * (1 + HIDDEN))
    model = Outputs(nn.RNN(1, HIDDEN, batch_first=True))
    values = torch.linspace(0, 1, 4000).reshape(20, 200, 1)
    found = collect(model, [(part[None],) for part in values])["rnn"]["l0"].inputs
    assert found.shape == (200, 1 + HIDDEN)
    # Of a uniform sample of 200 the mean is within 0.1 (five standard errors), and no part is left out.
    assert abs(float(found[:, 0].mean()) - 0.5) < 0.1
    assert torch.histc(found[:, 0], bins=4, min=0, max=1).min() > 20


def test_what_cannot_be_weighed_is_named() -> None:
    model = Outputs(nn.RNN(INPUTS, HIDDEN, batch_first=True))
    with pytest.raises(TaskError, match="yields nothing"):
        collect(model, [])

    class Symbols(Outputs):
        def forward(self, x: Tensor | PackedSequence) -> Tensor:
            return super().forward(x).argmax(-1)

    with pytest.raises(TaskError, match="logits"):
        collect(Symbols(model.rnn), [(torch.zeros(1, 2, INPUTS),)])

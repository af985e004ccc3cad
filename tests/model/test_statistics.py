"""Statistics equal sums over time loops written by hand, with the gradients taken at both products."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles import distance
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from htcompress.errors import TaskError
from htcompress.model import statistics as module_under_test
from htcompress.model.replace import recurrent_modules
from htcompress.model.statistics import collect
from htcompress.nn import watched
from htcompress.nn.recurrence import Recurrence
from htcompress.values import tensors_of

INPUTS, HIDDEN, STEPS, BATCH = 4, 3, 6, 5


# ---- the oracle: every recurrence as a loop over single steps --------------------------------------------


@dataclass
class Seen:
    """What one direction saw, step by step: its input, its state, and a zero added to each of its two products."""

    inputs: list[Tensor] = field(default_factory=list)
    at_ih: list[Tensor] = field(default_factory=list)
    at_hh: list[Tensor] = field(default_factory=list)

    def step(self, module: nn.Module, suffix: str, x: Tensor, state: list[Tensor]) -> list[Tensor]:
        """One step of one sequence, by the equations in torch's documentation."""

        def weight(name: str) -> Tensor | float:
            return getattr(module, name + suffix) if module.bias or "weight" in name else 0.0

        h = state[0]
        self.inputs.append(torch.cat([x, h]).detach())
        rows = weight("weight_ih").shape[0]
        self.at_ih.append(torch.zeros(rows, dtype=x.dtype, requires_grad=True))
        self.at_hh.append(torch.zeros(rows, dtype=x.dtype, requires_grad=True))
        a = weight("weight_ih") @ x + self.at_ih[-1] + weight("bias_ih")
        b = weight("weight_hh") @ h + self.at_hh[-1] + weight("bias_hh")
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            i, f, g, o = (a + b).chunk(4)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if getattr(module, "proj_size", 0):
                h = weight("weight_hr") @ h
            return [h, c]
        if isinstance(module, nn.GRU | nn.GRUCell):
            (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
            r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
            return [(1 - z) * torch.tanh(an + r * bn) + z * h]
        return [torch.tanh(a + b) if module.nonlinearity == "tanh" else torch.relu(a + b)]

    def moments(self) -> list[Tensor]:
        """The sums of delta delta^T at both products."""
        stacks = [torch.stack([e.grad for e in errors]).double() for errors in (self.at_ih, self.at_hh)]
        return [stack.T @ stack for stack in stacks]


class Unrolled(nn.Module):
    """A recurrent layer of torch as loops over sequences, directions and steps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen: dict[str, Seen] = {}

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        m = self.module
        packed = x if isinstance(x, PackedSequence) else None
        lengths = None
        if packed is not None:
            x, lengths = pad_packed_sequence(packed)
        unbatched = x.ndim == 2
        if unbatched:
            x = x.unsqueeze(1)
        elif m.batch_first and packed is None:
            x = x.transpose(0, 1)
        lengths = [x.shape[0]] * x.shape[1] if lengths is None else lengths.tolist()
        sizes = [getattr(m, "proj_size", 0) or m.hidden_size] + [m.hidden_size] * isinstance(m, nn.LSTM)
        given = None if hx is None else [t.unsqueeze(1) if unbatched else t for t in (hx if len(sizes) == 2 else [hx])]
        directions = ["", "_reverse"] if m.bidirectional else [""]
        sequences = [list(x[:length, b]) for b, length in enumerate(lengths)]
        last: list[list[list[Tensor]]] = []
        for layer in range(m.num_layers):
            outputs = [[[] for _ in sequence] for sequence in sequences]
            for backwards, suffix in enumerate(directions):
                direction = f"l{layer}{suffix}"
                seen = self.seen.setdefault(direction, Seen())
                ends = []
                for b, sequence in enumerate(sequences):
                    state = [t[layer * len(directions) + backwards, b] for t in given or []]
                    state = state or [torch.zeros(size, dtype=x.dtype) for size in sizes]
                    steps = range(len(sequence)) if backwards == 0 else reversed(range(len(sequence)))
                    for t in steps:
                        state = seen.step(m, f"_{direction}", sequence[t], state)
                        outputs[b][t].append(state[0])
                    ends.append(state)
                last.append(ends)
            sequences = [[torch.cat(parts) for parts in outputs[b]] for b in range(len(sequences))]
        out = nn.utils.rnn.pad_sequence([torch.stack(sequence) for sequence in sequences])
        after = [
            torch.stack([torch.stack([ends[k] for ends in direction]) for direction in last]) for k in range(len(sizes))
        ]
        if unbatched:
            out, after = out[:, 0], [t[:, 0] for t in after]
        if packed is not None:
            out = pack_padded_sequence(out, torch.tensor(lengths), enforce_sorted=packed.unsorted_indices is None)
        elif m.batch_first and not unbatched:
            out = out.transpose(0, 1)
        return out, tuple(after) if len(sizes) == 2 else after[0]


class UnrolledCell(nn.Module):
    """A recurrent cell of torch, one sequence after the other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen = {"cell": Seen()}

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        pair = isinstance(self.module, nn.LSTMCell)
        batch = x if x.ndim == 2 else x.unsqueeze(0)
        zero = torch.zeros(len(batch), self.module.hidden_size, dtype=x.dtype)
        given = [zero, zero][: 1 + pair] if hx is None else list(hx) if pair else [hx]
        given = [t if t.ndim == 2 else t.unsqueeze(0) for t in given]
        ends = [self.seen["cell"].step(self.module, "", row, [t[b] for t in given]) for b, row in enumerate(batch)]
        after = [torch.stack(parts) for parts in zip(*ends, strict=True)]
        after = [t if x.ndim == 2 else t[0] for t in after]
        return tuple(after) if pair else after[0]


def floats_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from floats_of(part)


def by_hand(model: nn.Module, batches: list[tuple[Any, ...]], *, seed: int = 0) -> dict[str, dict[str, Seen]]:
    """The statistics of a model, its recurrent modules unrolled, with the same random projections."""
    reference = copy.deepcopy(model).eval()
    unrolled = copy.deepcopy(reference)
    found: dict[str, dict[str, Seen]] = {}
    for name, module in recurrent_modules(unrolled).items():
        loop = UnrolledCell(module) if isinstance(module, nn.RNNCellBase) else Unrolled(module)
        parent, _, attribute = name.rpartition(".")
        setattr(unrolled.get_submodule(parent), attribute, loop)
        found[name] = loop.seen
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        parts = list(floats_of(unrolled(*batch)))
        for part, expected in zip(parts, floats_of(reference(*batch)), strict=True):
            assert distance(part.detach(), expected.detach()) < 1e-5, "the oracle is wrong"
        sum((t * torch.randn(t.shape, generator=generator)).sum() for t in parts).backward()
    return found


def same_rows(found: Tensor, expected: Tensor) -> bool:
    """Whether these are the same rows in any order."""
    if found.shape != expected.shape:
        return False
    gaps, nearest = torch.cdist(found.double(), expected.double()).min(1)
    return float(gaps.max()) < 1e-5 and len(nearest.unique()) == len(expected)


def check(model: nn.Module, batches: list[tuple[Any, ...]], *, seed: int = 0) -> None:
    expected = by_hand(model, batches, seed=seed)
    found = collect(model, iter(batches), seed=seed)
    assert {name: list(directions) for name, directions in found.items()} == {k: list(v) for k, v in expected.items()}
    for name, directions in expected.items():
        for direction, seen in directions.items():
            at_ih, at_hh = seen.moments()
            assert distance(found[name][direction].gradients_ih, at_ih / len(batches)) < 1e-5
            assert distance(found[name][direction].gradients_hh, at_hh / len(batches)) < 1e-5
            assert same_rows(found[name][direction].inputs, torch.stack(seen.inputs))


# ---- layers ---------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A recurrent layer and a head; the last states are part of the output."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        width = (getattr(rnn, "proj_size", 0) or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 2), nn.Tanh())

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> dict[str, Any]:
        out, state = self.rnn(x, hx)
        data = out.data if isinstance(out, PackedSequence) else out
        return {"scores": self.head(data), "state": state}


def make(kind: str, **options: Any) -> nn.Module:
    if kind in ("tanh", "relu"):
        return nn.RNN(INPUTS, HIDDEN, nonlinearity=kind, **options)
    return getattr(nn, kind)(INPUTS, HIDDEN, **options)


CASES = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"num_layers": 2, "bias": False}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"bias": False, "batch_first": True}),
    ("tanh", {"num_layers": 2, "bidirectional": True}),
    ("relu", {"bias": False}),
]


@pytest.mark.parametrize("way", ["by the kernel", "step by step"])
@pytest.mark.parametrize("form", ["padded", "packed", "packed unsorted", "unbatched", "given state"])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_layers_equal_loops_by_hand(
    kind: str, options: dict[str, Any], form: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Tensor] = []
    loop = watched.run_direction

    def counted(recurrence: Recurrence, z: Tensor, *arguments: Any, **named: Any) -> Any:
        steps.append(z)
        return loop(recurrence, z, *arguments, **named)

    monkeypatch.setattr(watched, "run_direction", counted)
    monkeypatch.setattr(watched, "pays_at", lambda *_, **__: way == "step by step")
    rnn = make(kind, **options)
    batches: list[tuple[Any, ...]] = []
    for _ in range(2):
        x = torch.randn(BATCH, STEPS, INPUTS) if options.get("batch_first") else torch.randn(STEPS, BATCH, INPUTS)
        stack = rnn.num_layers * (2 if rnn.bidirectional else 1)
        h0 = torch.randn(stack, BATCH, options.get("proj_size", HIDDEN))
        hx = (h0, torch.randn(stack, BATCH, HIDDEN)) if kind == "LSTM" else h0
        if form == "padded":
            batches.append((x,))
        elif form == "given state":
            batches.append((x, hx))
        elif form == "unbatched":
            single = tuple(t[:, 0] for t in hx) if kind == "LSTM" else hx[:, 0]
            batches.append((torch.randn(STEPS, INPUTS), single))
        else:
            lengths = [6, 4, 4, 2, 1] if form == "packed" else [3, 6, 1, 5, 3]
            first = bool(options.get("batch_first"))
            batches.append((pack_padded_sequence(x, torch.tensor(lengths), first, form == "packed"), hx))
    check(Tagger(rnn), batches)
    assert bool(steps) == (way == "step by step")


# ---- cells, several modules, several calls --------------------------------------------------------------


class Decoder(nn.Module):
    """A cell that reads its own output."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.out = nn.Linear(HIDDEN, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        state, scores = None, []
        for _ in range(STEPS):
            state = self.cell(x, state)
            x = self.out(state[0] if isinstance(state, tuple) else state)
            scores.append(x)
        return torch.stack(scores)


@pytest.mark.parametrize("shape", [(BATCH, INPUTS), (INPUTS,)], ids=["batch", "unbatched"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_equal_loops_by_hand(kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    cell = getattr(nn, kind)(INPUTS, HIDDEN, bias=bias)
    check(Decoder(cell), [(torch.randn(shape),), (torch.randn(shape),)])


class Translator(nn.Module):
    """An encoder that is called twice, and a decoder that starts from its state."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"encoder": nn.GRU(INPUTS, HIDDEN), "decoder": nn.GRU(INPUTS, HIDDEN)})

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        _, first = self.parts["encoder"](x)
        _, second = self.parts["encoder"](y, first)
        return self.parts["decoder"](y, torch.tanh(second))[0], first.sum(0)


def test_modules_that_are_called_twice_and_feed_each_other() -> None:
    check(Translator(), [(torch.randn(STEPS, BATCH, INPUTS), torch.randn(3, BATCH, INPUTS)) for _ in range(2)], seed=7)


def test_a_gru_s_candidate_sees_its_reset_gate() -> None:
    """Only the last third of the rows differs between the two products; in an LSTM none do."""
    batches = [(torch.randn(STEPS, BATCH, INPUTS),)]
    seen = collect(Tagger(nn.GRU(INPUTS, HIDDEN)), batches)["rnn"]["l0"]
    keep = 2 * HIDDEN
    assert distance(seen.gradients_hh[:keep, :keep], seen.gradients_ih[:keep, :keep]) < 1e-12
    assert distance(seen.gradients_hh[keep:, keep:], seen.gradients_ih[keep:, keep:]) > 0.1
    lstm = collect(Tagger(nn.LSTM(INPUTS, HIDDEN)), batches)["rnn"]["l0"]
    assert torch.equal(lstm.gradients_hh, lstm.gradients_ih)


def test_chosen_modules_only() -> None:
    batches = [(torch.randn(STEPS, BATCH, INPUTS), torch.randn(3, BATCH, INPUTS))]
    everything = collect(Translator(), batches)
    assert set(everything) == {"parts.encoder", "parts.decoder"}
    for names in (["parts.decoder"], (name for name in ["parts.decoder"])):
        assert set(collect(Translator(), batches, names=names)) == {"parts.decoder"}


def test_many_rows_keep_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Tagger(nn.GRU(INPUTS, HIDDEN)), [(torch.randn(STEPS, BATCH, INPUTS),)]
    full = collect(model, batches)["rnn"]["l0"]
    monkeypatch.setattr(module_under_test, "EXACT_LIMIT", 4)
    part = collect(model, batches)["rnn"]["l0"]
    assert part.gradients_ih.shape == (3 * HIDDEN,)
    # Products of a batch are summed in the model's precision.
    assert distance(part.gradients_ih, full.gradients_ih.diagonal()) < 1e-6
    assert distance(part.gradients_hh, full.gradients_hh.diagonal()) < 1e-6


def test_moments_are_summed_up_by_blocks_and_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Tagger(nn.GRU(INPUTS, HIDDEN)), [(torch.randn(STEPS, BATCH, INPUTS),) for _ in range(3)]
    whole = collect(model, batches)["rnn"]["l0"]
    monkeypatch.setattr(module_under_test, "_BLOCK", 5)
    assert 3 * HIDDEN > 5
    assert 3 * HIDDEN % 5
    part = collect(model, batches)["rnn"]["l0"]
    for name in ("gradients_ih", "gradients_hh"):
        found = getattr(part, name)
        assert torch.equal(found, found.T)
        assert distance(found, getattr(whole, name)) < 1e-6


def test_double_precision() -> None:
    check(Tagger(nn.LSTM(INPUTS, HIDDEN).double()).double(), [(torch.randn(STEPS, BATCH, INPUTS).double(),)])


# ---- what the caller notices ----------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = Tagger(make("LSTM", num_layers=2, dropout=0.5)).train()
    model.head.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modules = [id(module) for module in model.modules()]
    batch = torch.randn(STEPS, BATCH, INPUTS)
    kept, state = batch.clone(), torch.get_rng_state()
    with torch.no_grad():
        found = collect(model, [(batch,)])
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch, kept)
    assert not batch.requires_grad
    assert model.training
    assert all(module.training for module in model.modules())
    assert [id(module) for module in model.modules()] == modules
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"head.1.weight", "head.1.bias"}
    # Dropout was off: the same as in evaluation.
    again = collect(model.eval(), [(batch,)])
    assert torch.equal(found["rnn"]["l1"].gradients_ih, again["rnn"]["l1"].gradients_ih)


def test_batches_are_taken_once_and_counted() -> None:
    taken, done = [], []

    def batches() -> Iterator[tuple[Tensor]]:
        for k in range(3):
            taken.append(k)
            assert done == list(range(1, k + 1))  # one by one: nothing is stored up
            yield (torch.randn(STEPS, BATCH, INPUTS),)

    collect(Tagger(nn.LSTM(INPUTS, HIDDEN)), batches(), on_batch=done.append)
    assert (taken, done) == ([0, 1, 2], [1, 2, 3])


def test_repeatable_by_its_seed() -> None:
    model, batches = Tagger(nn.LSTM(INPUTS, HIDDEN)), [(torch.randn(STEPS, BATCH, INPUTS),)]
    first, second, third = (collect(model, batches, seed=seed)["rnn"]["l0"] for seed in (1, 1, 2))
    assert torch.equal(first.gradients_ih, second.gradients_ih)
    assert distance(first.gradients_ih, third.gradients_ih) > 1e-3


def test_no_batches_and_no_gradients_are_named() -> None:
    class Decoded(Tagger):
        def forward(self, x: Tensor, hx: Any = None) -> Tensor:
            return super().forward(x, hx)["scores"].argmax(-1)

    with pytest.raises(TaskError, match="yields nothing"):
        collect(Tagger(nn.LSTM(INPUTS, HIDDEN)), [])
    with pytest.raises(TaskError, match="logits"):
        collect(Decoded(nn.LSTM(INPUTS, HIDDEN)), [(torch.randn(STEPS, BATCH, INPUTS),)])


def test_a_direction_that_the_output_does_not_see_has_no_statistics() -> None:
    class Half(Tagger):
        def forward(self, x: Tensor, hx: Any = None) -> Tensor:
            return self.rnn(x)[0][..., :HIDDEN]

    found = collect(Half(nn.LSTM(INPUTS, HIDDEN, bidirectional=True)), [(torch.randn(STEPS, BATCH, INPUTS),)])
    unseen = found["rnn"].get("l0_reverse")
    assert unseen is None or not unseen.gradients_ih.any()
    assert found["rnn"]["l0"].gradients_ih.any()


def test_tensors_are_found_through_containers() -> None:
    a, b, c, d = (torch.randn(2) for _ in range(4))
    packed = pack_padded_sequence(torch.randn(3, 2, 1), torch.tensor([3, 2]))
    found = list(tensors_of({"x": [a, (b, None, 3)], "y": (torch.tensor([1]), packed, {"z": c}), "w": d}))
    assert [id(t) for t in found] == [id(t) for t in (a, b, packed.data, c, d)]


# ---- the sample of inputs -------------------------------------------------------------------------------


def test_the_sample_is_bounded_and_from_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "SAMPLE_NUMBERS", 100 * (INPUTS + HIDDEN))
    model = Tagger(nn.GRU(INPUTS, HIDDEN))
    batches = [(torch.randn(STEPS, BATCH, INPUTS),) for _ in range(12)]
    expected = torch.stack(by_hand(model, batches)["rnn"]["l0"].inputs)
    assert len(expected) == 360
    sample = collect(model, batches)["rnn"]["l0"].inputs
    assert sample.shape == (100, INPUTS + HIDDEN)
    gaps, nearest = torch.cdist(sample.double(), expected.double()).min(1)
    assert float(gaps.max()) < 1e-5
    assert len(nearest.unique()) == 100  # each row at most once
    assert len({int(i) // 30 for i in nearest}) > 8  # of most batches


def test_the_sample_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 of 640 rows, 300 times: every tenth of the stream is kept equally often."""
    monkeypatch.setattr(module_under_test, "SAMPLE_NUMBERS", 1)
    counts = torch.zeros(10)
    for seed in range(300):
        reservoir = module_under_test._Reservoir(torch.Generator().manual_seed(seed))
        for block in torch.arange(640.0).unsqueeze(1).split(50 + seed % 7):
            reservoir.add(block)
        assert reservoir.rows.shape == (64, 1)
        assert len(reservoir.rows.unique()) == 64
        counts += torch.bincount(reservoir.rows[:, 0].long() // 64, minlength=10)
    expected = 300 * 6.4
    assert float((counts - expected).square().sum() / expected) < 27.9  # chi squared, 9 degrees, 0.1 %

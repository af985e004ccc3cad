"""Time steps in C give what torch's kernels give, run where they are faster, and are done without where not built."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crossing import some
from torch import Tensor, nn

import htcompress
from htcompress.native import library
from htcompress.nn import compiled, program
from htcompress.nn.kernel_weights import KernelWeights
from htcompress.nn.recurrence import RECURRENCES, Recurrence, State

pytestmark = pytest.mark.skipif(library() is None, reason="there is no compiler")


def weights_of(
    recurrence: Recurrence, inputs: int, hidden: int, rank: int | None, *, bias: bool = True, ih: bool = True
) -> KernelWeights:
    """Weights of about the size that keeps states apart; `rank` None: a whole matrix."""
    rows = recurrence.gates * hidden
    recurrent: Tensor | tuple[Tensor, Tensor] = torch.randn(rows, hidden) / hidden**0.5
    if rank is not None:
        recurrent = torch.randn(rows, rank) / rank**0.5, torch.randn(hidden, rank) / hidden**0.5
    own = torch.randn(rows, inputs) / inputs**0.5 if ih else None
    biases = [torch.randn(rows) * 0.3 if bias else None for _ in range(2)]
    return KernelWeights(None, own, recurrent, biases[0], biases[1], None)


def wanted(recurrence: Recurrence, x: Tensor, state: State, weights: list[KernelWeights]) -> tuple[Tensor, State]:
    """By torch's kernels in float64, of the written out matrices."""
    flat = []
    for w in weights:
        ih = torch.eye(w.hh.shape[0]) if w.ih is None else w.ih
        flat += [t.double() for t in (ih, w.hh, w.bias_ih, w.bias_hh) if t is not None]
    biased = weights[0].bias_ih is not None
    given = tuple(t.double() for t in state)
    options = {"biased": biased, "training": False, "bidirectional": len(weights) == 2}
    return recurrence.run(x.double(), None, given, flat, **options)


SHAPES = [
    (5, 1, 9, 8, 3),
    (3, 7, 20, 40, 17),
    (6, 4, 3, 127, 31),
    (1, 9, 6, 16, 16),
    (4, 2, 8, 5, None),
    (2, 33, 8, 48, 5),
]
"""Steps, sequences, inputs, hidden units, rank."""


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda r: r.kind.value)
@pytest.mark.parametrize("shape", some(SHAPES, *SHAPES[:3]))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_torch_does(
    recurrence: Recurrence, shape: tuple[int, int, int, int, int | None], directions: int, bias: bool
) -> None:
    torch.manual_seed(0)
    steps, batch, inputs, hidden, rank = shape
    weights = [weights_of(recurrence, inputs, hidden, rank, bias=bias) for _ in range(directions)]
    x = torch.randn(batch, steps, inputs).transpose(0, 1)
    state = tuple(torch.randn(directions, batch, hidden) for _ in range(recurrence.states))
    before = [t.clone() for t in state]
    with torch.no_grad():
        out, after = compiled.run_compiled(recurrence, x, state, weights)
        out_wanted, after_wanted = wanted(recurrence, x, state, weights)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    scale = max(1.0, float(out_wanted.abs().max()))
    for found, right in zip((out, *after), (out_wanted, *after_wanted), strict=True):
        assert found.shape == right.shape
        assert float((found - right).abs().max()) < 3e-6 * scale


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda r: r.kind.value)
def test_features_that_are_what_enters_the_gates(recurrence: Recurrence) -> None:
    torch.manual_seed(0)
    weights = [weights_of(recurrence, 1, 12, 4, ih=False)]
    x = torch.randn(5, 3, recurrence.gates * 12)
    state = tuple(torch.zeros(1, 3, 12) for _ in range(recurrence.states))
    with torch.no_grad():
        out, _ = compiled.run_compiled(recurrence, x, state, weights)
    assert float((out - wanted(recurrence, x, state, weights)[0]).abs().max()) < 3e-6


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0, 1e4, 1e30])
def test_small_and_large_numbers(scale: float) -> None:
    """Relative to what comes out: near zero an LSTM's state is as small as what enters it."""
    recurrence = RECURRENCES[0]
    torch.manual_seed(0)
    weights = [weights_of(recurrence, 6, 16, 4, bias=False)]
    x = scale * torch.randn(4, 3, 6)
    state = tuple(torch.zeros(1, 3, 16) for _ in range(2))
    with torch.no_grad():
        out, _ = compiled.run_compiled(recurrence, x, state, weights)
    right, _ = wanted(recurrence, x, state, weights)
    assert float((out - right).abs().max()) < 3e-6 * float(right.abs().max())


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda r: r.kind.value)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(recurrence: Recurrence, value: float) -> None:
    torch.manual_seed(0)
    weights = [weights_of(recurrence, 6, 16, 4)]
    x = torch.randn(3, 2, 6)
    x[1, 0, 2] = value
    state = tuple(torch.zeros(1, 2, 16) for _ in range(recurrence.states))
    with torch.no_grad():
        out, _ = compiled.run_compiled(recurrence, x, state, weights)
    right, _ = wanted(recurrence, x, state, weights)
    assert torch.equal(out.isnan(), right.isnan())
    assert torch.equal(out[0], out[0].nan_to_num())


def layers(**options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = nn.LSTM(40, 64, 2, bidirectional=True, batch_first=True, **options).eval()  # type: ignore[arg-type]
    made = htcompress.compress(dense, ratio=4).model
    assert made is not None
    return dense, made


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the layers that are run so from now on."""
    found: list[int] = []
    run = compiled.run_compiled

    def counted(*arguments: object) -> object:
        found.append(1)
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("htcompress.nn.kernel.run_compiled", counted)
    return found


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = layers()
    taken = calls(monkeypatch)
    x = torch.randn(3, 9, 40)
    learning = made(x)[0].detach()
    assert not taken
    with torch.no_grad():
        found = made(x)[0]
    assert len(taken) == 2
    assert float((found - learning).abs().max()) < 2e-6
    with torch.inference_mode():
        assert torch.equal(made(x)[0], found)
    assert len(taken) == 4
    # Neither for packed sequences, nor in other precisions, nor while a graph is made.
    del taken[:]
    with torch.no_grad():
        made(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([9, 4, 2]), batch_first=True))
        copy.deepcopy(made).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            made(x)
        torch.jit.trace(made, (x,), check_trace=False)
    assert not taken


FORMS: dict[str, dict[str, object]] = {
    "as found": {"ratio": 4},
    "truncated SVDs": {"ratio": 4, "layout": "svd"},
    "one matrix": {"ratio": 4, "scope": "integrated", "layout": "svd"},
    "folded": {"ratio": 6, "layout": "split", "scope": "separate"},
    "in the order of units": {"ratio": 4, "unit_order": "readers"},
    "whole": {"ratio": 1},
    "whole, one matrix": {"ratio": 1, "scope": "integrated"},
    "rounded": {"budget": "60kB"},
}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", [False, True])
def test_numbers_that_change_are_seen(kind: type[nn.Module], form: str, frozen: bool) -> None:
    """Every number, one tensor after the other; what is computed of them is not kept beyond that."""
    torch.manual_seed(0)
    made = htcompress.compress(kind(40, 64), **FORMS[form]).model  # type: ignore[arg-type]
    assert made is not None
    x = torch.randn(5, 2, 40)
    made.freeze(frozen)
    with torch.no_grad():
        before = made(x)[0]
        for name, parameter in made.named_parameters():
            parameter.mul_(0.7)
            if frozen:
                made.freeze()
            found = made(x)[0]
            with torch.enable_grad():
                wanted = made(x)[0]
            assert float((found - wanted).abs().max()) < 3e-6, name
            assert not torch.equal(found, before), name
            before = found


def test_large_whole_matrices_and_many_sequences_are_left_to_torch() -> None:
    lstm = RECURRENCES[0]
    x = torch.randn(4, 64, 12)
    with torch.no_grad():
        assert not compiled.applies(lstm, x, None, [weights_of(lstm, 12, 64, None)])
        assert compiled.applies(lstm, x[:, :2], None, [weights_of(lstm, 12, 64, None)])
        assert not compiled.applies(lstm, x[:, :2], None, [weights_of(lstm, 12, 1024, None)])
        assert compiled.applies(lstm, x[:, :2], None, [weights_of(lstm, 12, 1024, 16)])


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made = htcompress.compress(cell(40, 64), ratio=4).model
    assert made is not None
    taken = calls(monkeypatch)
    x = torch.randn(900, 40)
    with torch.no_grad():
        made(x[:3])
        assert not taken  # one step of few small products is over before it has been called
        found = made(x)
    assert taken
    wanted = made(x)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max()) < 2e-6


@pytest.mark.parametrize("vectors", some([1, 5, 6, 7, 13, 96], 1, 7))
@pytest.mark.parametrize("inputs", some([1, 2, 31, 4096, 4097, 9000], 1, 4097))
@pytest.mark.parametrize("rank", some([1, 3, 8, 14, 16, 17, 31, 33, 64], 3, 16, 33))
@pytest.mark.parametrize("beside", [0, 5])
def test_thin_products(vectors: int, inputs: int, rank: int, beside: int) -> None:
    """Of factors that stand alone, and that are columns of a larger one."""
    torch.manual_seed(0)
    x, whole = torch.randn(vectors, inputs), torch.randn(inputs, rank + beside)
    factor = whole[:, :rank]
    with torch.no_grad():
        found = program.thin_product(x, factor)
    wanted = x.double() @ factor.double()
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < 1e-6 * inputs**0.5 * 10


def test_wide_inputs_are_reduced_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made = htcompress.compress(nn.LSTM(5000, 16), budget=30_000, layout="svd", scope="separate").model
    assert made is not None
    found: list[int] = []
    run = program.thin_product

    def counted(x: Tensor, factor: Tensor) -> Tensor:
        found.append(len(x))
        return run(x, factor)

    monkeypatch.setattr("htcompress.nn.kernel_weights.thin_product_in_c", counted)
    x = torch.randn(4, 3, 5000) / 8
    wanted = made(x)[0]
    assert not found
    with torch.no_grad():
        assert float((made(x)[0] - wanted).abs().max()) < 3e-6
    assert found == [12]


SCRIPT = """
import torch, htcompress
from htcompress.native import library
torch.manual_seed(0)
made = htcompress.compress(torch.nn.LSTM(40, 64), ratio=4).model
with torch.no_grad():
    print(library() is not None, float(made(torch.ones(5, 2, 40))[0].sum()))
"""


def test_without_a_compiler_torch_computes_the_same(tmp_path: Path) -> None:
    def ran(**environment: str) -> tuple[str, float]:
        command = [sys.executable, "-c", SCRIPT]
        given = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
        built, total = done.stdout.split()
        return built, float(total)

    built, right = ran()
    assert built == "True"
    (made,) = (tmp_path / ".cache" / "htcompress").iterdir()
    assert made.stat().st_mode & 0o777 in (0o755, 0o775, 0o700)
    for environment in ({"HTCOMPRESS_COMPILED": "0"}, {"PATH": str(tmp_path)}):
        built, found = ran(**environment)
        assert built == "False"
        assert found == pytest.approx(right, abs=1e-4)
    # Where nothing can be kept, it is built for the process.
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert ran(HOME=str(blocked)) == ("True", right)

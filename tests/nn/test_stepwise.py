"""Stepping through time with a thin recurrent matrix against the native kernels with the whole one."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from crossing import crossed
from oracles import distance
from torch import Tensor, nn

from htcompress import compress
from htcompress.nn import HTRecurrent, kernel, stepwise

CASES: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"proj_size": 10}),
    (nn.LSTM, {"bias": False}),
    (nn.GRU, {}),
    (nn.GRU, {"bias": False}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


def run(
    model: HTRecurrent, x: Tensor, step: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Any, dict[str, Tensor], int]:
    """The outputs, the last states, the gradients, and how often the loop ran."""
    calls = []
    loop = stepwise.run_stepwise

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return loop(*arguments)

    monkeypatch.setattr(stepwise, "_STEP", step)
    monkeypatch.setattr(kernel, "run_stepwise", counted)
    model.zero_grad()
    out, last = model(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), last, grads, len(calls)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("kind", "more", "options", "scope"),
    crossed(
        [
            (*case, options, scope)
            for case, options, scope in product(
                CASES, [{}, {"num_layers": 2, "bidirectional": True}], ["integrated", "separate"]
            )
        ]
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_same_outputs_states_and_gradients(
    kind: type[nn.Module], more: dict[str, Any], options: dict[str, Any], scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = kind(20, 24, **options, **more).double()
    model = compress(dense, ratio=5, scope=scope, layout="split").modules[""]
    x = torch.randn(9, 3, 20, dtype=torch.float64)
    native = run(model, x, 1e15, monkeypatch)
    looped = run(model, x, -1e15, monkeypatch)
    assert native[3] == 0
    assert looped[3] > 0 or scope == "separate"
    assert distance(looped[0], native[0]) < 1e-12
    for a, b in zip(*((r[1] if isinstance(r[1], tuple) else (r[1],)) for r in (looped, native)), strict=True):
        assert distance(a, b) < 1e-12
    assert looped[2].keys() == native[2].keys()
    assert all(distance(looped[2][name], grad) < 1e-9 for name, grad in native[2].items())


def test_only_large_thin_matrices_are_stepped_through() -> None:
    def weights(state: int, rank: int | None) -> list[kernel.KernelWeights]:
        ih, whole = torch.zeros(4 * state, 3), torch.zeros(4 * state, state)
        recurrent = whole if rank is None else (whole[:, :rank], whole[:state, :rank])
        return [kernel.KernelWeights(None, ih, recurrent, None, None, None)]

    x = torch.zeros(6, 16, 3)
    assert stepwise.pays(x, None, weights(2048, 5))
    assert not stepwise.pays(x, None, weights(64, 5))
    assert not stepwise.pays(x, None, weights(2048, None))
    assert not stepwise.pays(x, torch.tensor([16] * 6), weights(2048, 5))
    assert stepwise.pays(x, None, weights(2048, 1900))
    with torch.no_grad():
        assert stepwise.pays(x, None, weights(2048, 5))
        assert not stepwise.pays(x, None, weights(2048, 1900))

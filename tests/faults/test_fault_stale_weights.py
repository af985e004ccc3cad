"""Faults of kind 3: a layer that answers by weights it no longer has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from crossing import crossed
from fault_models import compact, near
from torch import nn

import htcompress


def by_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(1.0)


def by_set(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 0.5


def by_averaging(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.lerp_(torch.ones_like(p), 0.5)


def by_numpy(model: nn.Module) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= 0.3


def by_loading(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)


def by_fused_adam(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    with torch.enable_grad():
        model(torch.randn(3, 2, 32))[0].square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("change", "layout", "scope"),
    crossed(
        list(
            product(
                [by_data, by_set, by_averaging, by_numpy, by_loading, by_fused_adam],
                ["svd", "split", "paired"],
                ["integrated", "separate"],
            )
        ),
        1,
    ),
)
def test_3_outputs_are_those_of_the_present_parameters(
    change: Callable[[nn.Module], None], layout: str, scope: str
) -> None:
    model = compact(nn.LSTM(32, 24), budget=1500, layout=layout, scope=scope)
    x = torch.randn(3, 2, 32)
    with torch.no_grad():
        before = model(x)[0]
        assert torch.equal(model(x)[0], before)
        change(model)
        assert near(model(x)[0], copy.deepcopy(model)(x)[0], 1e-6)
        assert not near(model(x)[0], before, 1e-3)


def test_3_a_frozen_layer_does_not_look() -> None:
    model = compact(nn.LSTM(32, 24), budget=1500, layout="split")
    assert isinstance(model, htcompress.nn.HTRecurrent)
    x = torch.randn(3, 2, 32)
    with torch.no_grad():
        model.freeze()
        before = model(x)[0]
        by_data(model)
        assert torch.equal(model(x)[0], before)
        model.freeze(False)
        assert not torch.equal(model(x)[0], before)

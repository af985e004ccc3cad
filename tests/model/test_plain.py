"""Large dense layers run without oneDNN for a while, with the same outputs, and are as they were afterwards."""

from __future__ import annotations

import pytest
import torch
from oracles import distance
from torch import nn

from htcompress.model import plain
from htcompress.model.plain import without_packing


def flag_in(module: nn.Module, x: torch.Tensor) -> list[bool]:
    """Whether oneDNN was on while the module's own forward ran."""
    seen: list[bool] = []
    handle = module.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    inner = module.forward

    def spied(*arguments: object) -> object:
        seen.append(torch.backends.mkldnn.enabled)
        return type(module).forward(module, *arguments)

    module.forward = spied
    with without_packing(module):
        module(x)
    assert module.forward is spied, "a forward of the user's own is put back"
    del module.forward
    assert module.forward == inner
    handle.remove()
    return seen


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_only_large_layers_and_only_their_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 2, 30)
    layer = nn.LSTM(30, 8)
    assert flag_in(layer, x) == [True, True]
    monkeypatch.setattr(plain, "_LARGE", 30 * 32)
    assert flag_in(layer, x) == [False, True]
    expected = layer(x)[0]
    with without_packing(layer):
        assert distance(layer(x)[0], expected) < 1e-5
    assert torch.backends.mkldnn.enabled


def test_no_model_is_fine() -> None:
    with without_packing(None):
        pass


def test_an_error_inside_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_LARGE", 1)
    layer = nn.GRU(3, 4)
    with pytest.raises(ZeroDivisionError), without_packing(layer):
        raise ZeroDivisionError
    assert "forward" not in vars(layer)

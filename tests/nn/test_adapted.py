"""Recurrences that torch has not: called as torch's modules are, and compressed as those are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import htcompress
from htcompress.model.statistics import collect
from htcompress.nn.adapted import ADAPTED, dense_module
from htcompress.nn.recurrence import recurrence_of
from htcompress.nn.recurrent import HTGRU, HTRecurrent
from htcompress.nn.settings import RecurrentSettings
from htcompress.vocabulary import Kind

BEFORE = RecurrentSettings(Kind.GRU, 6, 5, num_layers=2, bidirectional=True, batch_first=True, resets_before=True)
HARD = RecurrentSettings(Kind.LSTM, 6, 5, bias=False, activations="hard_sigmoid,softsign")
SINE = RecurrentSettings(Kind.RNN_TANH, 6, 5, activations="softsign")
EVERY = {"GRU": BEFORE, "LSTM": HARD, "RNN": SINE}


def outputs(module: nn.Module, x: Tensor | PackedSequence) -> list[Tensor]:
    y, last = module(x)
    y = pad_packed_sequence(y, batch_first=True)[0] if isinstance(y, PackedSequence) else y
    return [y, *(last if isinstance(last, tuple) else [last])]


@pytest.mark.parametrize("case", EVERY)
def test_called_as_torch_is(case: str) -> None:
    """Sequences of unlike lengths, packed, give what each gives alone; gradients reach all weights."""
    torch.manual_seed(0)
    module = dense_module(replace(EVERY[case], batch_first=True))
    assert isinstance(module, ADAPTED)
    assert isinstance(module, getattr(nn, case))
    rows = [torch.randn(steps, 6) for steps in (4, 7, 2)]
    y, *last = outputs(module, pack_sequence(rows, enforce_sorted=False))
    for k, row in enumerate(rows):
        alone, *own = outputs(module, row)
        assert torch.allclose(y[k, : len(row)], alone, atol=1e-6)
        assert all(torch.allclose(a[:, k], b, atol=1e-6) for a, b in zip(last, own, strict=True))
    (y.sum() + sum(state.sum() for state in last)).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in module.parameters())


@pytest.mark.parametrize("case", EVERY)
def test_what_is_kept_whole_computes_the_same(case: str) -> None:
    torch.manual_seed(0)
    module = dense_module(EVERY[case])
    x = torch.randn(3, 8, 6)
    wanted = outputs(module, x)
    compact = htcompress.compress(module, ratio=1).model
    assert isinstance(compact, HTRecurrent)
    assert compact.settings == EVERY[case]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs(compact, x), wanted, strict=True))
    settings = RecurrentSettings.from_config(json.loads(json.dumps(compact.settings.to_config())))
    again = type(compact).from_config(settings, json.loads(json.dumps(compact.to_config())))
    again.load_state_dict(compact.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, x), outputs(compact, x), strict=True))


def test_settings_of_torch_are_told_as_ever() -> None:
    settings = RecurrentSettings(Kind.GRU, 3, 4)
    assert not {"activations", "resets_before"} & settings.to_config().keys()
    assert recurrence_of(Kind.GRU).native
    assert recurrence_of(Kind.LSTM, ("sigmoid", "tanh")) is recurrence_of(Kind.LSTM)
    assert not recurrence_of(Kind.GRU, resets_before=True).native


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="no reset gate"):
        recurrence_of(Kind.LSTM, resets_before=True)
    with pytest.raises(ValueError, match="no activation swish; expected one of sigmoid, tanh"):
        recurrence_of(Kind.LSTM, ("swish", "tanh"))
    with pytest.raises(ValueError, match="no projections and no dropout"):
        dense_module(replace(HARD, proj_size=3))


def test_statistics_are_of_what_the_matrices_read() -> None:
    """A third of the rows of W_hh reads the state through the reset gate: so does a third of the sample."""
    torch.manual_seed(0)
    settings = RecurrentSettings(Kind.GRU, 3, 4, resets_before=True)
    module = dense_module(settings)
    x = torch.randn(50, 6, 3)
    (found,) = collect(module, [(x,)])[""].values()
    out, _ = module(x)
    h = torch.cat([torch.zeros(1, 6, 4), out[:-1]]).reshape(-1, 4)
    weights = dict(module.named_parameters())
    z = x.reshape(-1, 3) @ weights["weight_ih_l0"].T + weights["bias_ih_l0"] + weights["bias_hh_l0"]
    reset = torch.sigmoid((z + h @ weights["weight_hh_l0"].T)[:, :4])
    states = found.inputs[:, 3:]
    plain, through = ((states - wanted).abs().amax(1) < 1e-5 for wanted in (h, reset * h))
    later = slice(6, None)  # at the first step both are zero
    assert (plain | through).all()
    assert 0.3 < through[later].float().mean() < 0.37
    assert found.gradients_hh is found.gradients_ih


def test_reading_the_weights_of_a_stand_in() -> None:
    module = dense_module(RecurrentSettings(Kind.GRU, 6, 5, resets_before=True))
    compact = htcompress.compress(module, ratio=1).model
    assert isinstance(compact, HTGRU)
    for name, weight in module.named_parameters():
        if name.startswith("weight"):
            assert torch.allclose(getattr(compact, name), weight, atol=1e-5)
    assert "resets_before=True" in repr(compact)

"""What an inspection says of a checkpoint, against singular values from torch's own SVD."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import save_tagger, tagger
from torch import nn

from htcompress.errors import CheckpointError, RequestError
from htcompress.inspection import SHARES, inspect_checkpoint


def best_rank(matrix: torch.Tensor, error: float) -> int:
    values = torch.linalg.svdvals(matrix.detach().double())
    for rank in range(len(values) + 1):
        if float(values[rank:].norm() / values.norm()) <= error:
            return rank
    raise AssertionError


def test_a_checkpoint(tmp_path: Path) -> None:
    model = tagger()
    found = inspect_checkpoint(save_tagger(tmp_path / "model.pt"))
    assert (found.file, found.parameters, found.rnn_parameters) == ("model.pt", 1115, 1088)
    (layer,) = found.layers
    assert (layer.name, layer.kind, layer.parameters) == ("rnn", "lstm", 1088)
    assert layer.settings["hidden_size"] == 8
    assert [m.name for m in layer.matrices] == ["rnn.l0.ih", "rnn.l0.hh"]
    for shown, dense in zip(layer.matrices, (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0), strict=True):
        values = torch.linalg.svdvals(dense.detach().double())
        assert shown.shape == tuple(dense.shape)
        assert torch.allclose(torch.tensor(shown.spectrum).double(), values / values[0], atol=1e-5)
        assert shown.ranks == {str(error): best_rank(dense, error) for error in (0.5, 0.1, 0.01)}
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_outlook_is_that_of_truncated_svd(tmp_path: Path) -> None:
    # One matrix that dominates the other: what a budget buys is its rank alone, and rank one of the other.
    model = nn.LSTM(30, 6, bias=False)
    with torch.no_grad():
        model.weight_hh_l0.mul_(1e-4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = inspect_checkpoint(tmp_path / "model.pt")
    total = sum(p.numel() for p in model.parameters())
    assert [(o.budget, o.share) for o in found.outlook] == [(int(total * share), share) for share in SHARES]
    values = torch.linalg.svdvals(model.weight_ih_l0.detach().double())
    budget = found.outlook[0].budget
    rank = next(r for r in range(30) if (r + 1) * (24 + 30) > budget - (24 + 6))
    expected = float(values[rank:].norm() / values.norm())
    assert found.outlook[0].weight_error == pytest.approx(expected, abs=1e-3)
    errors = [o.weight_error for o in found.outlook if o.weight_error is not None]
    assert errors == sorted(errors)
    assert found.outlook[-1].weight_error is None


def test_projections_cells_and_directions(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.LSTM(5, 4, bidirectional=True, proj_size=2), "b": nn.GRUCell(3, 4)})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = inspect_checkpoint(tmp_path / "model.pt")
    names = [m.name for layer in found.layers for m in layer.matrices]
    ends = ("ih", "hh", "hr")
    assert names == [f"a.{direction}.{end}" for direction in ("l0", "l0_reverse") for end in ends] + [
        "b.cell.ih",
        "b.cell.hh",
    ]
    assert [layer.name for layer in inspect_checkpoint(tmp_path / "model.pt", layers="b").layers] == ["b"]
    with pytest.raises(RequestError, match="matches none of the recurrent layers: 'a', 'b'"):
        inspect_checkpoint(tmp_path / "model.pt", layers="c")


def test_weights_of_zero(tmp_path: Path) -> None:
    model = nn.RNN(3, 4)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = inspect_checkpoint(tmp_path / "model.pt")
    assert [m.ranks["0.01"] for layer in found.layers for m in layer.matrices] == [0, 0]
    assert set(found.layers[0].matrices[0].spectrum) == {0.0}


def test_bad_checkpoints_are_told(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no recurrent layers"):
        inspect_checkpoint(tmp_path / "model.pt")

"""`export --to dense`: the original class takes it with strict=True, and does what the compressed model does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from crossing import crossed
from layers import CASES, HIDDEN, INPUTS, LAYOUTS, SCOPES, TABLE, drop_in, make
from safetensors.torch import load_file
from small import Tagger, Twice, clips, tagger
from torch import nn

import htcompress
from htcompress.errors import CheckpointError
from htcompress.exporting.dense import dense_tensors, dense_weights

CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"})]


@pytest.mark.parametrize(("kind", "options", "scope", "layout"), crossed(TABLE), ids=str)
def test_every_option(kind: str, options: dict[str, object], scope: str, layout: str) -> None:
    module = make(kind, **options)
    again = make(kind, **options)
    weights = dense_weights(drop_in(module, scope, layout))
    again.load_state_dict(weights, strict=True)
    assert not any(weight.requires_grad for weight in weights.values())
    x = torch.randn(3, 8, INPUTS)
    for found, expected in zip(flat(again(x)), flat(module(x)), strict=True):
        assert float((found - expected).detach().abs().max()) < 1e-5


def flat(result: tuple[torch.Tensor, object]) -> list[torch.Tensor]:
    output, last = result
    return [output, *(last if isinstance(last, tuple) else [last])]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("cell", "options"), CELLS, ids=str)
def test_cells(cell: type[nn.Module], options: dict[str, str], scope: str) -> None:
    module = cell(INPUTS, HIDDEN, **options)
    again = cell(INPUTS, HIDDEN, **options)
    again.load_state_dict(dense_weights(drop_in(module, scope)), strict=True)
    x = torch.randn(4, INPUTS)
    for found, expected in zip(again(x), module(x), strict=True):
        assert float((found - expected).detach().abs().max()) < 1e-5


def test_the_table_has_every_option() -> None:
    assert {kind for kind, _ in CASES} == {"LSTM", "GRU", "tanh", "relu"}
    assert {scope for *_, scope, _ in TABLE} == set(SCOPES)
    assert {layout for *_, layout in TABLE} == set(LAYOUTS)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_an_output_directory(tmp_path: Path, name: str) -> None:
    result = htcompress.compress(tagger(), budget=400)
    htcompress.save(result, tmp_path / "out")
    done = htcompress.export(tmp_path / "out", tmp_path / name, to="dense")
    assert done.files == (tmp_path / name,)
    state = load_file(tmp_path / name) if name.endswith("safetensors") else torch.load(tmp_path / name)
    again = Tagger()
    again.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert float((again(clips()) - result.model(clips())).abs().max()) < 1e-5
    # No file is larger than the dense model's weights: no view drags its whole matrix along.
    assert (tmp_path / name).stat().st_size < 4 * sum(p.numel() for p in again.parameters()) + 8192


def test_a_layer_under_two_names(tmp_path: Path) -> None:
    model = Twice()
    result = htcompress.compress(model, budget=400)
    htcompress.save(result, tmp_path / "out")
    again = Twice()
    again.load_state_dict(dense_tensors(tmp_path / "out"), strict=True)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert float((again(x) - result.model(x)).abs().max()) < 1e-5


def test_each_tensor_keeps_the_type_it_is_stored_in(tmp_path: Path) -> None:
    result = htcompress.compress(tagger().half(), budget=400)
    htcompress.save(result, tmp_path / "out")
    tensors = dense_tensors(tmp_path / "out")
    assert {name: t.dtype for name, t in tensors.items() if name.startswith("head")} == {
        "head.weight": torch.float16,
        "head.bias": torch.float16,
    }
    # Cores are in the layer's precision, and so is what is written out of them.
    assert {t.dtype for name, t in tensors.items() if name.startswith("rnn")} == {torch.float16}
    Tagger().half().load_state_dict(tensors, strict=True)


def test_a_damaged_directory(tmp_path: Path) -> None:
    htcompress.save(htcompress.compress(tagger(), budget=400), tmp_path / "out")
    other = tmp_path / "other"
    htcompress.save(htcompress.compress(tagger(), budget=300), other)
    shutil.copy(other / "config.json", tmp_path / "out" / "config.json")
    with pytest.raises(CheckpointError, match="Convert the model again"):
        dense_tensors(tmp_path / "out")

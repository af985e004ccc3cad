"""Which of several state_dicts in a file is taken, and what its names are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import equal, tagger
from torch import Tensor, nn

from htcompress.errors import CheckpointError
from htcompress.model.inventory import inventory
from htcompress.sources.read import read_checkpoint

State = dict[str, Tensor]


def save_zip(state: Any, path: Path) -> None:
    torch.save(state, path)


def moved(state: State, by: float) -> State:
    return {name: tensor + by for name, tensor in state.items()}


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "anything"])
def test_other_weights_are_named_and_can_be_taken(tmp_path: Path, key: str) -> None:
    state, path = dict(tagger().state_dict()), tmp_path / "model.pt"
    optimizer = torch.optim.Adam(tagger().parameters())
    averaged = moved(state, 1.0)
    torch.save({"state_dict": state, key: averaged, "optimizer": optimizer.state_dict(), "epoch": 2}, path)
    read = read_checkpoint(path)
    assert (read.key, read.others) == ("state_dict", (key,))
    assert equal(read.tensors, state)
    other = read_checkpoint(path, weights=key)
    assert (other.key, other.others) == (key, ())
    assert equal(other.tensors, averaged)
    with pytest.raises(CheckpointError, match=f"no weights at 'none'; there are state_dict, {key}"):
        read_checkpoint(path, weights="none")


def test_weights_deeper_down(tmp_path: Path) -> None:
    state, path = dict(tagger().state_dict()), tmp_path / "model.pt"
    torch.save({"model": {"state_dict": state, "ema": moved(state, 1.0)}, "swa": {"module": moved(state, 2.0)}}, path)
    assert read_checkpoint(path).others == ("swa", "model.ema")
    assert equal(read_checkpoint(path, weights="model.ema").tensors, moved(state, 1.0))
    assert equal(read_checkpoint(path, weights="swa").tensors, moved(state, 2.0))


def test_weights_of_a_file_that_has_one_state_dict(tmp_path: Path) -> None:
    save_zip(dict(tagger().state_dict()), tmp_path / "a.pt")
    save_file(dict(tagger().state_dict()), tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        with pytest.raises(CheckpointError, match="'ema'"):
            read_checkpoint(tmp_path / name, weights="ema")


def test_several_state_dicts_belong_together(tmp_path: Path) -> None:
    encoder, decoder, path = nn.LSTM(3, 2).state_dict(), nn.GRU(2, 2).state_dict(), tmp_path / "model.pt"
    rng = {"rng_state": torch.get_rng_state(), "grad_scaler": {"scale": torch.ones(())}}
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], momentum=0.9)
    whole = {"encoder": encoder, "decoder": {"gru": decoder}, "mean": torch.ones(3), "opt_d": optimizer.state_dict()}
    torch.save({**whole, **rng, "decoder_ema": decoder}, path)
    read = read_checkpoint(path)
    expected = {f"encoder.{n}": t for n, t in encoder.items()} | {f"decoder.gru.{n}": t for n, t in decoder.items()}
    assert equal(read.tensors, expected | {"mean": torch.ones(3)})
    assert read.others == ("decoder_ema",)
    assert [layer.name for layer in inventory(read.tensors)] == ["encoder", "decoder.gru"]
    assert equal(read_checkpoint(path, weights="decoder").tensors, decoder)


@pytest.mark.parametrize("key", ["net", "generator", "weights"])
def test_the_only_state_dict_is_taken_whatever_its_key(tmp_path: Path, key: str) -> None:
    state, path = dict(tagger().state_dict()), tmp_path / "model.pt"
    optimizer = torch.optim.Adam(tagger().parameters())
    torch.save({key: state, "optimizer": optimizer.state_dict(), "epoch": torch.tensor(3), "best": 0.5}, path)
    read = read_checkpoint(path)
    assert read.key == key
    assert equal(read.tensors, state)

"""Output directories by Hugging Face's names: the same as load and save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import Tagger, clips, equal, listing, tagger
from torch import nn

import htcompress
from htcompress import Compressed
from htcompress.errors import CheckpointError
from htcompress.vocabulary import LayoutKind


def test_they_are_load_and_save(compressed: Compressed, tmp_path: Path) -> None:
    compressed.save_pretrained(tmp_path / "a")
    htcompress.save_pretrained(compressed, tmp_path / "b")
    htcompress.save(compressed, tmp_path / "c")
    assert listing(tmp_path / "a") == listing(tmp_path / "b") == listing(tmp_path / "c")
    model = tagger(1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for place in (tmp_path / "a", str(tmp_path / "a"), tmp_path / "a" / "model.safetensors"):
        back = htcompress.from_pretrained(place, model)
        assert not back.training
        assert equal(back.state_dict(), htcompress.load(tmp_path / "c", model).state_dict())
        assert compressed.model is not None
        assert torch.equal(back(clips()), compressed.model(clips()))
    assert model.training
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("dense", [nn.GRU(10, 6, batch_first=True), nn.LSTM(10, 6).double()], ids=["gru", "double"])
def test_one_layer_needs_no_model(dense: nn.Module, tmp_path: Path) -> None:
    made = htcompress.compress(dense, budget=300, layout=LayoutKind.SVD)
    made.save_pretrained(tmp_path / "out")
    back = htcompress.from_pretrained(tmp_path / "out")
    assert isinstance(back, type(dense))
    assert not back.training
    x = torch.randn(3, 5, 10, dtype=next(dense.parameters()).dtype)
    assert made.model is not None
    assert torch.equal(back(x)[0], made.model(x)[0])


class Headed(nn.GRU):
    """A recurrent layer that is a model of its own."""

    def __init__(self) -> None:
        super().__init__(10, 6)
        self.head = nn.Linear(6, 2)


def test_a_layer_with_more_in_it_needs_its_class(tmp_path: Path) -> None:
    htcompress.compress(Headed(), budget=300, layout=LayoutKind.SVD).save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="whose class is not in it"):
        htcompress.from_pretrained(tmp_path / "out")
    assert isinstance(htcompress.from_pretrained(tmp_path / "out", Headed()), Headed)


def test_what_cannot_be_loaded(compressed: Compressed, tmp_path: Path) -> None:
    compressed.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"a larger model, with the layers 'rnn', .* Give an instance"):
        htcompress.from_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"downloads nothing.*snapshot_download\('someone/some-model'\)"):
        htcompress.from_pretrained("someone/some-model", Tagger())
    (tmp_path / "empty").mkdir()
    for model in (None, Tagger()):
        with pytest.raises(CheckpointError, match="is not an output directory of htcompress"):
            htcompress.from_pretrained(tmp_path / "empty", model)

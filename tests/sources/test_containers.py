"""Weights in other containers than a state_dict's: the same tensors by the same names, and nothing of them is run."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crossing import some
from safetensors.torch import save_file
from small import Outcome, clips, equal, save_tagger, tagger, write_task
from torch import nn

from htcompress.errors import CheckpointError
from htcompress.sources.read import read_checkpoint


class Nested(nn.Module):
    """Parts that are called as checkpoints call state_dicts, a buffer that is not stored, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tagger()
        self.state_dict_of = nn.ModuleDict({"a.b".replace(".", "_"): nn.GRU(3, 4), "c": nn.LSTMCell(3, 4)})
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.tied = self.model.head
        self.note = {"anything": object}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


SAVES: dict[str, Callable[[Any, Path], None]] = {
    "zip": torch.save,
    "legacy": legacy,
    "protocol 4": lambda value, path: torch.save(value, path, pickle_protocol=4),
}


@pytest.mark.parametrize("save", some(SAVES, "zip", "legacy"))
@pytest.mark.parametrize("make", [tagger, Nested], ids=["tagger", "nested"])
@pytest.mark.parametrize("beside", [False, True])
def test_whole_modules(tmp_path: Path, make: Callable[[], nn.Module], save: str, beside: bool) -> None:
    model = make()
    path = tmp_path / "m.pt"
    optimizer = torch.optim.Adam(model.parameters())
    value = {"model": model, "optimizer": optimizer.state_dict(), "settings": os.environ.__class__} if beside else model
    SAVES[save](value, path)
    read = read_checkpoint(path)
    assert equal(read.tensors, model.state_dict())
    assert read.key == ("model" if beside else "")


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, clips())])
def test_torchscript(tmp_path: Path, make: Callable[[nn.Module], Any]) -> None:
    model = tagger().eval()
    torch.jit.save(make(model), tmp_path / "m.pt")
    assert equal(read_checkpoint(tmp_path / "m.pt").tensors, model.state_dict())


def test_programs_of_torch_export(tmp_path: Path) -> None:
    model = tagger().eval()
    torch.export.save(torch.export.export(model, (clips(),)), tmp_path / "m.pt2")
    assert equal(read_checkpoint(tmp_path / "m.pt2").tensors, model.state_dict())
    content = (tmp_path / "m.pt2").read_bytes()
    for length in range(0, len(content), len(content) // 23):
        (tmp_path / "cut.pt2").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "cut.pt2")


@pytest.mark.parametrize("by", ["directory", "index"])
def test_shards(tmp_path: Path, by: str) -> None:
    state = tagger().state_dict()
    names = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(names.values()):
        save_file({name: state[name] for name in state if names[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    place = tmp_path if by == "directory" else index
    assert equal(read_checkpoint(place).tensors, state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 2 shards, of which model-00002-of-00002.safetensors is missing"):
        read_checkpoint(place)
    for wrong in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', "not json"):
        index.write_text(wrong)
        with pytest.raises(CheckpointError, match="is no index of shards"):
            read_checkpoint(place)


def test_a_directory_of_one_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a directory without model.safetensors or pytorch_model.bin"):
        read_checkpoint(tmp_path)
    torch.save(tagger().state_dict(), tmp_path / "pytorch_model.bin")
    assert equal(read_checkpoint(tmp_path).tensors, tagger().state_dict())


def test_an_output_directory_is_no_checkpoint(tmp_path: Path, htc: Callable[..., Outcome]) -> None:
    save_tagger(tmp_path / "model.pt")
    assert htc("convert", "model.pt", "--budget", "400", "-o", "out").code == 0
    ended = htc("convert", "out", "--budget", "300")
    assert ended.code == 2
    assert "compressed already" in ended.err


def test_a_whole_module_is_compressed_and_tuned(tmp_path: Path, htc: Callable[..., Outcome]) -> None:
    torch.save(tagger(), tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    ended = htc("convert", "model.pt", "--budget", "400", "--task", "task.py", "--steps", "3", "-o", "out")
    assert ended.code == 0, ended.err


def test_what_archives_hold_is_told(tmp_path: Path) -> None:
    torch.save(tagger().state_dict(), tmp_path / "model.pt")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "model.pt", "net/model.pt")
        archive.add(tmp_path / "model.pt", "net/notes.txt")
    with pytest.raises(CheckpointError, match=r"is a gzip archive with net/model.pt, net/notes.txt; .* Unpack it"):
        read_checkpoint(tmp_path / "model.tar.gz")
    # A bomb: what is looked at is bounded.
    with gzip.open(tmp_path / "zeros.gz", "wb") as file:
        for _ in range(200):
            file.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match="is a gzip archive; expected"):
        read_checkpoint(tmp_path / "zeros.gz")


def test_the_next_step_is_that_of_the_format(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.npz"):
            archive.writestr(name, "{}")
    with pytest.raises(CheckpointError, match=r'model.save\("model.keras"\) where h5py is installed'):
        read_checkpoint(tmp_path / "m.keras")
    (tmp_path / "m.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(100))
    with pytest.raises(CheckpointError, match=r"tf2onnx.convert --tflite"):
        read_checkpoint(tmp_path / "m.tflite")

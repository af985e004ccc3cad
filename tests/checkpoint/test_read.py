"""Reading checkpoints: every common container of a state_dict, and never code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import Tagger, equal, tagger
from torch import Tensor, nn

from htcompress.checkpoint.read import read_checkpoint
from htcompress.errors import CheckpointError

State = dict[str, Tensor]


def save_zip(state: Any, path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "save"),
    [
        *((f"model{suffix}", save_zip) for suffix in (".pt", ".pth", ".ckpt", ".bin", "")),
        ("legacy.pt", save_legacy),
        ("model.safetensors", save_file),
    ],
)
def test_containers(tmp_path: Path, name: str, save: Callable[[State, Path], None]) -> None:
    state = tagger().state_dict()
    path = tmp_path / name
    save(dict(state), path)
    read = read_checkpoint(str(path))
    assert equal(read.tensors, state)
    assert read.path == path
    assert read.size == path.stat().st_size
    assert len(read.sha256) == 64


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize(
    "wrap",
    [
        *(
            (lambda s, key=key: {key: s, "epoch": 3})
            for key in ("state_dict", "model", "model_state", "model_state_dict")
        ),
        lambda s: {"model": {"state_dict": s, "epoch": 3}},
        lambda s: {"epoch": torch.tensor(3), "state_dict": s},
        lambda s: {**s, "note": "a string beside the tensors"},
        lambda s: prefixed(s, "module."),
        lambda s: prefixed(s, "_orig_mod."),
        lambda s: prefixed(s, "module._orig_mod."),
        lambda s: prefixed(s, "_orig_mod.module."),
        lambda s: {"state_dict": prefixed(s, "module."), "callbacks": {}, "hyper_parameters": {"lr": 0.1}},
    ],
)
def test_nesting_and_prefixes(tmp_path: Path, wrap: Callable[[State], Any], save: Callable[[Any, Path], None]) -> None:
    state = tagger().state_dict()
    save(wrap(dict(state)), tmp_path / "model.pt")
    assert equal(read_checkpoint(tmp_path / "model.pt").tensors, state)


def test_optimizer_state_beside_the_model(tmp_path: Path) -> None:
    model = tagger()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 5, 24)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    whole = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "loss": 0.5,
    }
    torch.save(whole, tmp_path / "model.ckpt")
    assert equal(read_checkpoint(tmp_path / "model.ckpt").tensors, model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_dtypes_are_kept(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    state = tagger().to(dtype).state_dict()
    (save_file if name.endswith("safetensors") else save_zip)(dict(state), tmp_path / name)
    assert equal(read_checkpoint(tmp_path / name).tensors, state)


class Payload:
    """Unpickling it with plain pickle runs a shell command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("save", [save_zip, save_legacy, lambda o, p: p.write_bytes(pickle.dumps(o))])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"state_dict": tagger().state_dict(), "extra": p}])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_code_in_a_pickle_never_runs(
    tmp_path: Path, wrap: Callable[[Payload], Any], save: Callable[[Any, Path], None], suffix: str
) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"evil{suffix}"
    save(wrap(Payload(marker)), path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def whole_module(path: Path) -> None:
    torch.save(tagger(), path)


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def truncated(path: Path) -> None:
    torch.save(tagger().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-500])


def random_bytes(path: Path) -> None:
    path.write_bytes(bytes(torch.randint(256, (4096,), dtype=torch.uint8).tolist()))


BROKEN: list[tuple[str, Callable[[Path], object], list[str]]] = [
    ("none.pt", lambda path: None, ["There is no file", "Give the path"]),
    ("folder.pt", Path.mkdir, ["is a directory", "expected a checkpoint file"]),
    ("empty.pt", Path.touch, ["is empty", "Save it again"]),
    ("cut.pt", truncated, ["not a readable torch checkpoint", "cut short"]),
    (
        "cut.safetensors",
        lambda p: p.write_bytes(b"\x40" + bytes(7) + b'{"a":'),
        ["not a readable safetensors", "cut short"],
    ),
    ("noise.pt", random_bytes, ["not a readable torch checkpoint", "torch.save(model.state_dict()"]),
    ("noise.safetensors", random_bytes, ["not a readable safetensors", "another format"]),
    ("text.pt", lambda p: p.write_text("epoch 1, loss 0.3\n"), ["not a readable torch checkpoint"]),
    ("json.pt", lambda p: p.write_text('{"a": 1}'), ["not a readable torch checkpoint"]),
    ("module.pt", whole_module, ["pickled Python objects (small.Tagger)", "model.state_dict()"]),
    ("script.pt", torchscript, ["TorchScript archive", "expected a state_dict"]),
    ("list.pt", lambda p: torch.save([torch.zeros(2)], p), ["holds list", "expected a state_dict"]),
    ("number.pt", lambda p: torch.save(3, p), ["holds int"]),
    ("nothing.pt", lambda p: torch.save({}, p), ["holds an empty dict"]),
    (
        "other.pt",
        lambda p: torch.save({"net": {"w": torch.zeros(2)}, "epoch": 3}, p),
        ["keys net, epoch", "model_state"],
    ),
]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("name", "make", "words"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_broken_files_are_explained(
    tmp_path: Path, name: str, make: Callable[[Path], object], words: list[str]
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) or str(path) in message
    for word in words:
        assert word in message
    assert message.endswith(".")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(("name", "save"), [("a.pt", save_zip), ("b.pt", save_legacy), ("c.safetensors", save_file)])
def test_a_file_cut_at_any_length_is_explained(tmp_path: Path, name: str, save: Callable[[State, Path], None]) -> None:
    save(dict(Tagger(2, 2).state_dict()), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for part in range(1, 60):
        (tmp_path / name).write_bytes(whole[: len(whole) * part // 60])
        # The pickle of a legacy file may be cut within a name, and is then another name.
        expected = "It may be cut short|holds pickled" if save is save_legacy else "It may be cut short"
        with pytest.raises(CheckpointError, match=expected) as caught:
            read_checkpoint(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1

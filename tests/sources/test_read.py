"""Reading checkpoints: every common container of a state_dict, and never code."""

from __future__ import annotations

import os
import pickle
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from small import Tagger, Twice, equal, tagger
from torch import Tensor, nn

from htcompress.errors import CheckpointError
from htcompress.model.inventory import inventory
from htcompress.sources.read import read_checkpoint

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
    ("list.pt", lambda p: torch.save([torch.zeros(2)], p), ["holds list", "expected a state_dict"]),
    ("number.pt", lambda p: torch.save(3, p), ["holds int"]),
    ("nothing.pt", lambda p: torch.save({}, p), ["holds an empty dict"]),
    (
        "other.pt",
        lambda p: torch.save({"net": {"w": 0.5}, "epoch": 3}, p),
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


TENSORS: dict[str, Tensor] = {
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "a part": torch.arange(12.0)[3:7],
    "every third": torch.arange(12)[1::3],
    "of one number": torch.tensor(3.5),
    "empty": torch.empty(0, 7),
    "of one repeated": torch.ones(1).expand(5, 4),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "a parameter": nn.Parameter(torch.randn(3)),
    "a buffer": nn.Buffer(torch.randn(3)),
    **{
        str(dtype): torch.tensor([0, 1, 3]).to(dtype)
        for dtype in (
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.float8_e4m3fn,
            torch.int8,
            torch.uint8,
            torch.uint16,
            torch.uint64,
            torch.int64,
            torch.bool,
            torch.complex64,
        )
    },
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_what_torch_reads(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "model.pt"
    shared = torch.randn(6, 4)
    state = TENSORS | {"whole": shared, "again": shared, "row": shared[2]}
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path).tensors
    # Torch's own reader knows protocol 2 only, and few dtypes in the older form.
    expected = torch.load(path, weights_only=True) if protocol == 2 and zipped else state
    assert list(read) == list(expected)
    for name, tensor in read.items():
        like = expected[name].detach()
        assert type(tensor) is Tensor
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (like.dtype, like.shape, like.stride())
        assert tensor.contiguous().view(-1).view(torch.uint8).equal(like.contiguous().view(-1).view(torch.uint8))
    assert read["whole"].data_ptr() == read["again"].data_ptr()
    assert read["row"].data_ptr() == read["whole"].data_ptr() + 2 * 4 * 4


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_is_what_torch_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    plain = torch.randn(4, 3)
    scales, zeros = torch.rand(4) + 0.1, torch.arange(4)
    state = {
        "a": torch.quantize_per_tensor(plain, 0.1, 3, torch.qint8),
        "b": torch.quantize_per_channel(plain, scales, zeros, 0, torch.qint8),
    }
    torch.save(state, path)
    read, expected = read_checkpoint(path).tensors, torch.load(path, weights_only=True)
    for name in state:
        assert read[name].dtype == torch.qint8
        assert torch.equal(read[name].dequantize(), expected[name].dequantize())


def test_values_beside_the_tensors_do_not_matter(tmp_path: Path) -> None:
    import argparse

    import numpy as np

    path = tmp_path / "model.ckpt"
    beside = {
        "args": argparse.Namespace(lr=0.1, device=torch.device("cpu")),
        "best": np.float64(0.5),
        "history": np.arange(3),
        "words": {"a", "b"},
        "counts": Counter("abc"),
        "lists": defaultdict(list, {"a": [1]}),
        "seen": b"bytes",
        "long": 1 << 80,
        "version": torch.torch_version.TorchVersion("2.0"),
    }
    torch.save({"state_dict": tagger().state_dict(), **beside}, path)
    assert equal(read_checkpoint(path).tensors, tagger().state_dict())


class Keeps(nn.Module):
    """A module with state that is no tensor, and one with a version."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def get_extra_state(self) -> Any:
        return {"steps": 3, "words": ["a", "b"], "scale": torch.ones(2)}

    def set_extra_state(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_metadata_and_extra_state_are_kept(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    model, path = Keeps(), tmp_path / "model.pt"
    state = model.state_dict()
    save({"state_dict": state, "epoch": 1}, path)
    read = read_checkpoint(path)
    assert read.metadata == state._metadata  # type: ignore[attr-defined]
    assert read.metadata is not None
    assert read.metadata["norm"] == {"version": 2}
    assert list(read.extra) == ["_extra_state"]
    kept = read.extra["_extra_state"]
    assert (kept["steps"], kept["words"], kept["scale"].tolist()) == (3, ["a", "b"], [1.0, 1.0])
    again = OrderedDict({**read.tensors, **read.extra})
    again._metadata = read.metadata  # type: ignore[attr-defined]
    fresh = Keeps()
    fresh.load_state_dict(again)
    assert equal(dict(fresh.named_parameters()), dict(model.named_parameters()))


def test_metadata_of_changed_names_is_not_kept(tmp_path: Path) -> None:
    model = nn.DataParallel(Keeps())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    read = read_checkpoint(tmp_path / "model.pt")
    assert read.metadata is None
    assert "rnn.weight_ih_l0" in read.tensors
    assert list(read.extra) == ["_extra_state"]


def test_files_are_recognised_by_content(tmp_path: Path) -> None:
    state = dict(tagger().state_dict())
    save_file(state, tmp_path / "a.pt")
    save_zip(state, tmp_path / "b.safetensors")
    save_legacy(state, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.safetensors", "c.safetensors"):
        assert equal(read_checkpoint(tmp_path / name).tensors, state)


def test_names_that_save_model_left_out_are_back(tmp_path: Path) -> None:
    model, path = Twice(), tmp_path / "model.safetensors"
    save_model(model, str(path))
    read = read_checkpoint(path).tensors
    assert equal(read, model.state_dict())
    assert read["second.weight_hh_l0"].data_ptr() == read["first.weight_hh_l0"].data_ptr()
    assert [layer.name for layer in inventory(read)] == ["first"]
    # What says that it is of PyTorch is no further name, not even of a tensor that is called so.
    save_file({"pt": torch.ones(1)}, path, metadata={"format": "pt"})
    assert list(read_checkpoint(path).tensors) == ["pt"]


def zipped(*names: str, method: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name in names:
                archive.writestr(name, b"{}" * 50)

    return make


def deflated(path: Path) -> None:
    torch.save(tagger().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def taped(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "keras 3": (zipped("config.json", "metadata.json", "model.weights.h5"), "is not a readable HDF5 file"),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is not a readable HDF5 file"),
    "onnx": (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(100)), "is an ONNX file"),
    "zip": (zipped("a.txt", "b/c.txt"), "is a zip archive without a torch checkpoint"),
    "npz": (zipped("a.npy"), "no .npy file of plain arrays"),
    "exported": (zipped("m/models/model.json", "m/data/weights/w"), "a program of torch.export"),
    "tar": (taped, "is a tar archive"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(100)), "is a gzip archive"),
    "lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
    "page": (lambda p: p.write_text("<!DOCTYPE html><html>Not found"), "is a web page"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"w": [1.0]})), "a Python pickle that torch.save has not written"),
    "deflated": (deflated, "a zip archive with compressed entries"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_files_are_named(tmp_path: Path, case: str) -> None:
    make, words = FOREIGN[case]
    make(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(tmp_path / "model.pt")
    assert len(str(caught.value).splitlines()) == 1


class Without:
    """An object that holds no tensors."""

    def __init__(self) -> None:
        self.packed = [1, 2]


def test_an_object_without_tensors_is_told_by_its_class(tmp_path: Path) -> None:
    torch.save(Without(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"an object of \S*Without without tensors of its own"):
        read_checkpoint(tmp_path / "model.pt")

"""Arrays of NumPy as checkpoints, and names of their own: read as torch has them, or refused with a next step."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import bounded, refused
from small import Outcome, Tagger, equal, save_tagger, tagger, write_task
from torch import nn

import htcompress
from htcompress.errors import CheckpointError, RequestError
from htcompress.request import Goal, Request
from htcompress.sources.naming import names_of
from htcompress.sources.read import read_checkpoint
from htcompress.vocabulary import LayoutKind

Command = Callable[..., Outcome]
Arrays = dict[str, np.ndarray]


def arrays(model: nn.Module) -> Arrays:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def folder_of(path: Path, given: Arrays) -> None:
    path.mkdir()
    for name, array in given.items():
        np.save(path / f"{name}.npy", array)


SAVES: dict[str, Callable[[Path, Arrays], None]] = {
    "npz": lambda path, given: np.savez(path, **given),
    "packed": lambda path, given: np.savez_compressed(path, **given),
    "folder": folder_of,
    "wrapped": lambda path, given: np.savez(path, **{f"module.{name}": array for name, array in given.items()}),
    "slashes": lambda path, given: np.savez(path, **{name.replace(".", "/"): array for name, array in given.items()}),
}


@pytest.mark.parametrize("save", SAVES)
def test_torchs_names_are_read_at_once(tmp_path: Path, save: str) -> None:
    model = tagger()
    SAVES[save](tmp_path / "w.npz", arrays(model))
    read = read_checkpoint(tmp_path / "w.npz")
    assert equal(read.tensors, model.state_dict())
    again = read_checkpoint(tmp_path / "w.npz")
    assert read.sha256 == again.sha256
    assert len(read.sha256) == 64


def test_types_and_orders_of_numbers(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal((12, 3))
    given = {
        "weight_hh_l0": np.asfortranarray(numbers),
        "weight_ih_l0": numbers.astype(">f4"),
        "bias_ih_l0": numbers[:, 0].astype("f2"),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(7),
        "flags": np.array([True, False]),
        "note": np.array("text"),
    }
    np.savez(tmp_path / "w.npz", **given)
    found = read_checkpoint(tmp_path / "w.npz").tensors
    assert found.keys() == given.keys() - {"note"}
    for name, tensor in found.items():
        assert tensor.shape == given[name].shape
        assert np.array_equal(tensor.numpy(), given[name])
    assert found["weight_ih_l0"].dtype is torch.float32


LAYERS: dict[str, nn.Module] = {
    "lstm": nn.LSTM(10, 6),
    "gru": nn.GRU(5, 7, num_layers=2, bidirectional=True),
    "projected": nn.LSTM(10, 6, proj_size=4),
    "cell": nn.GRUCell(6, 6),
    "no bias": nn.LSTM(3, 4, bias=False),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("turned", [False, True])
def test_matrices_are_transposed_where_only_that_fits(tmp_path: Path, layer: str, turned: bool) -> None:
    own = arrays(LAYERS[layer])
    given = {f"v{k}": array.T if turned else array for k, array in enumerate(own.values())}
    np.savez(tmp_path / "w.npz", **given)
    read = read_checkpoint(tmp_path / "w.npz", names=dict(zip(own, given, strict=True)))
    assert equal(read.tensors, LAYERS[layer].state_dict())


def test_what_could_be_either_is_not_guessed(tmp_path: Path) -> None:
    own = arrays(nn.RNN(10, 6))
    np.savez(tmp_path / "w.npz", w=own["weight_ih_l0"].T, u=own["weight_hh_l0"], b=own["bias_ih_l0"])
    names = {"weight_ih_l0": "w", "weight_hh_l0": "u", "bias_ih_l0": "b"}
    with pytest.raises(CheckpointError, match=r"u \(6, 6\) may be weight_hh_l0 or its transpose.* u|Write .*u\.T"):
        read_checkpoint(tmp_path / "w.npz", names=names)
    for way, wanted in ((".N", own["weight_hh_l0"]), (".T", own["weight_hh_l0"].T)):
        read = read_checkpoint(tmp_path / "w.npz", names=names | {"weight_hh_l0": f"u{way}"})
        assert np.array_equal(read.tensors["weight_hh_l0"].numpy(), wanted)
        assert np.array_equal(read.tensors["weight_ih_l0"].numpy(), own["weight_ih_l0"])
    # As many inputs as rows: the other matrix does not tell.
    own = arrays(nn.LSTM(24, 6))
    np.savez(tmp_path / "w.npz", w=own["weight_ih_l0"], u=own["weight_hh_l0"].T)
    with pytest.raises(CheckpointError, match=r"w \(24, 24\) may be weight_ih_l0"):
        read_checkpoint(tmp_path / "w.npz", names={"weight_ih_l0": "w", "weight_hh_l0": "u"})


def test_one_bias_for_two(tmp_path: Path) -> None:
    own = arrays(nn.LSTM(10, 6))
    np.savez(tmp_path / "w.npz", w=own["weight_ih_l0"].T, u=own["weight_hh_l0"], b=own["bias_ih_l0"])
    names = {"weight_ih_l0": "w", "weight_hh_l0": "u", "bias_ih_l0": "b", "bias_hh_l0": "0"}
    found = read_checkpoint(tmp_path / "w.npz", names=names).tensors
    assert np.array_equal(found["weight_ih_l0"].numpy(), own["weight_ih_l0"])
    assert torch.equal(found["bias_hh_l0"], torch.zeros(24))
    for wrong in ({"weight_hh_l0": "u", "bias_hh_l0": "0"}, names | {"weight_ih_l0": "0"}):
        with pytest.raises(CheckpointError, match="stands for a bias of zeros"):
            read_checkpoint(tmp_path / "w.npz", names=wrong)


def test_names_are_for_any_file_of_weights(tmp_path: Path) -> None:
    state = tagger().state_dict()
    torch.save({name.replace("rnn.", "enc_"): tensor for name, tensor in state.items()}, tmp_path / "m.pt")
    names = {name: name.replace("rnn.", "enc_") for name in state if name.startswith("rnn.")}
    assert equal(read_checkpoint(tmp_path / "m.pt", names=names).tensors, state)


def test_messages_list_the_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", enc_w=np.zeros((32, 24)), enc_u=np.zeros((32, 8)), dense=np.zeros((8, 3)))
    held = r"enc_w \(32, 24\), enc_u \(32, 8\), dense \(8, 3\)"
    with pytest.raises(CheckpointError, match=rf"{held}; none is named like weight_hh_l0.*--names 'rnn.weight_ih_l0="):
        read_checkpoint(tmp_path / "w.npz")
    with pytest.raises(CheckpointError, match=rf"no array enc_x; it holds {held}"):
        read_checkpoint(tmp_path / "w.npz", names={"rnn.weight_ih_l0": "enc_x"})
    with pytest.raises(CheckpointError, match="not the weights of one layer"):
        read_checkpoint(tmp_path / "w.npz", names={"rnn.weight_ih_l0": "dense", "rnn.weight_hh_l0": "enc_u"})
    with pytest.raises(CheckpointError, match="an array dense already"):
        read_checkpoint(tmp_path / "w.npz", names={"dense": "enc_u"})
    with pytest.raises(CheckpointError, match="'ema' asked for"):
        read_checkpoint(tmp_path / "w.npz", weights="ema")


@pytest.mark.parametrize("text", ["", "a", "a=", "=b", "a=b,a=c", "{", '{"a": 1}', '{"a": "b", "a": "c"}'])
def test_names_that_say_nothing(text: str) -> None:
    with pytest.raises(RequestError, match="--names"):
        names_of(text)


def test_names_as_they_are_written() -> None:
    assert names_of(None) is None
    assert names_of("a=b, c = d.T,") == names_of('{"a": "b", "c": "d.T"}') == {"a": "b", "c": "d.T"}


# ---- hostile files ---------------------------------------------------------------------------------------------


def npy(descr: object = "<f4", shape: object = (2, 2), content: bytes = bytes(16), fortran: object = False) -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran!r}, 'shape': {shape!r}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "objects": (pickled(), "holds Python objects, .* not read"),
    "a claim": (npy(shape=(1 << 40, 1 << 20)), "needs .* bytes, and there are 16"),
    "cut": (npy()[:-1], "needs 16 bytes, and there are 15"),
    "longer": (npy() + b"\0", "needs 16 bytes, and there are 17"),
    "negative": (npy(shape=(-1, -4)), "a shape that no array has"),
    "deep": (npy(shape=(1,) * 70), "a shape that no array has"),
    "no numbers": (npy(shape=("a",)), "a shape that no array has"),
    "fields": (npy([("a", "<f4")]), "no array that can be read"),
    "an expression": (npy().replace(b"(2, 2)", b"open()"), "no array that can be read"),
    "no type": (npy("nonsense"), "no array that can be read"),
    "raw": (npy("|V4"), "save it as float32"),
    "long double": (npy("<f16", (1,)), "no array that can be read"),
    "a long header": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "its header has 2147483647 bytes"),
    "version 3": (b"\x93NUMPY\x03\x00" + bytes(20), "no .npy file of plain arrays"),
    "nothing": (b"", "no .npy file of plain arrays"),
}


@pytest.mark.parametrize("where", ["npz", "folder"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arrays(tmp_path: Path, case: str, where: str) -> None:
    content, words = HOSTILE[case]
    place = tmp_path / "w"
    if where == "npz":
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("weight_hh_l0.npy", content)
    else:
        place.mkdir()
        (place / "weight_hh_l0.npy").write_bytes(content)
    with bounded(), pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(place)
    assert str(place) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_hostile_archives(tmp_path: Path) -> None:
    place = tmp_path / "w.npz"
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("weight_hh_l0.npy", "w") as file:
        file.write(npy(shape=(32 << 18,), content=b""))
        for _ in range(32):
            file.write(bytes(1 << 20))
    with bounded():
        assert "more than trained weights are ever packed by" in refused(place)
    with zipfile.ZipFile(place, "w") as archive:
        for name in ("a/weight_hh_l0.npy", "a.weight_hh_l0.npy"):
            archive.writestr(name, npy())
    assert "has two arrays called a.weight_hh_l0" in refused(place)
    # Sizes that are not true, and damage anywhere.
    np.savez_compressed(place, **arrays(tagger()))
    whole = place.read_bytes()
    for at in range(0, len(whole), len(whole) // 40):
        for broken in (whole[:at], whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :]):
            place.write_bytes(broken)
            with bounded(), contextlib.suppress(CheckpointError):
                read_checkpoint(place)


# ---- commands --------------------------------------------------------------------------------------------------

GOAL = Goal(budget=400, layout=LayoutKind.SVD)


def test_commands(htc: Command, tmp_path: Path) -> None:
    model = tagger()
    own = arrays(model)
    np.savez("plain.npz", **own)
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    np.savez(
        "own.npz",
        **{name.replace("rnn.", "enc_"): array.T for name, array in own.items() if "rnn" in name},
        **{name: array for name, array in own.items() if "rnn" not in name},
    )
    names = ",".join(f"{name}={name.replace('rnn.', 'enc_')}" for name in own if "rnn" in name)
    seen = htc("inspect", "model.pt", "--json")
    for arguments in (("plain.npz",), ("own.npz", "--names", names)):
        found = htc("inspect", *arguments, "--json")
        assert found.code == 0, found.err
        assert json.loads(found.out) == json.loads(seen.out) | {"file": arguments[0]}
    assert htc("inspect", "own.npz").code == 2
    fast = ("--layout", "svd", "--steps", 1, "-q", "--json", "--task", "task.py")
    made = htc("convert", "own.npz", "--names", names, "--budget", 400, "-o", "out", *fast)
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert report["request"]["names"] == names_of(names)
    # The report is enough to find the teacher again, and to ask for the same.
    assert htc("finetune", "out", "--task", "task.py", "--steps", 1, "-q").code == 0
    command = Request.of_report(report["request"]).command("own.npz")
    assert json.dumps(names_of(names)) in command
    same = htc("evaluate", "model.pt", "--task", "task.py")
    assert htc("evaluate", "own.npz", "--task", "task.py", "--names", names).out == same.out
    assert isinstance(htcompress.load("out", Tagger()), Tagger)


def test_convert_of_the_library(tmp_path: Path) -> None:
    own = arrays(tagger())
    folder_of(tmp_path / "w", {name.replace("rnn.", "enc_"): array for name, array in own.items()})
    names = {name: name.replace("rnn.", "enc_") for name in own if "rnn" in name}
    made = htcompress.convert(tmp_path / "w", goal=GOAL, names=names)
    known = htcompress.convert(save_tagger(tmp_path / "m.pt"), goal=GOAL)
    assert equal(made.tensors, known.tensors)

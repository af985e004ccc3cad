"""Files of Keras: torch's weights made of them compute what Keras's equations say, and go back into the file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from crossing import some
from keras_files import BATCH, INPUTS, STEPS, UNITS, Array, arrays_of, layer, legacy, model, modern, named, run
from small import Outcome

from htcompress.errors import CheckpointError, HTCompressError
from htcompress.inspection import inspect_checkpoint
from htcompress.model.inventory import inventory
from htcompress.nn.settings import RecurrentSettings
from htcompress.sources.keras_file import KerasFile
from htcompress.sources.read import read_checkpoint
from htcompress.vocabulary import Kind


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def answered(path: Path, name: str, x: Array, kind: Kind | None = None) -> Array:
    """What torch's module gives that the weights in a file are loaded into, (batch, time, directions * units)."""
    tensors = read_checkpoint(path).tensors
    (settings,) = (found.settings for found in inventory(tensors) if found.name == name)
    recurrence = RecurrentSettings(kind or settings.kind, 1, 1).recurrence
    more = {} if recurrence.nonlinearity is None else {"nonlinearity": recurrence.nonlinearity}
    made = recurrence.torch_layer(
        settings.input_size, settings.hidden_size, bias=settings.bias, bidirectional=settings.bidirectional,
        batch_first=True, **more,
    )  # fmt: skip
    own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    made.load_state_dict(own)
    with torch.no_grad():
        return np.asarray(made(torch.from_numpy(x))[0])


def inputs(rng: np.random.Generator, width: int = INPUTS) -> Array:
    return rng.standard_normal((BATCH, STEPS, width)).astype(np.float32)


GROUPS = {"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "simple_rnn"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((cls, {"use_bias": bias}) for cls in ("LSTM", "SimpleRNN") for bias in (True, False)),
    *(("GRU", {"use_bias": bias, "reset_after": True}) for bias in (True, False)),
    ("GRU", {}),
    ("SimpleRNN", {"activation": "relu"}),
]
CONTAINERS = ("h5", "weights of Keras 2", "keras", "weights of Keras 3")


def written(place: Path, container: str, cls: str, config: dict[str, Any], arrays: list[Array]) -> Path:
    """One layer called `rec` in a file, or `rec_0` by its class where nothing keeps its name."""
    whole = model(layer("InputLayer", "in"), layer(cls, "rec", **config))
    owned = {"in": {}, "rec": named("rec/cell_3", arrays)}
    if container == "h5":
        return legacy(place, owned, whole)
    if container == "weights of Keras 2":
        return legacy(place, owned)
    group = f"layers/{GROUPS[cls]}"
    if container == "keras":
        return modern(place, {f"{group}/cell": arrays}, whole)
    return modern(place, {f"{group}/cell": arrays}, names={group: "rec"})


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("cls", "config"), CASES, ids=str)
def test_layers_compute_as_keras_says(
    tmp_path: Path, rng: np.random.Generator, cls: str, config: dict[str, Any], container: str
) -> None:
    arrays, x = arrays_of(cls, rng, **config), inputs(rng)
    path = written(tmp_path / "file", container, cls, config, arrays)
    if cls == "GRU" and not config.get("use_bias", True) and "weights" in container:
        with pytest.raises(CheckpointError, match="nothing tells whether it resets its state before the matrix"):
            read_checkpoint(path)
        return
    activation = config.get("activation", "tanh")
    kind = Kind.RNN_RELU if activation == "relu" else None
    wanted = run(cls, arrays, x, activation)
    assert np.abs(answered(path, "rec", x, kind) - wanted).max() < 1e-5


@pytest.mark.parametrize("cls", ["CuDNNLSTM", "CuDNNGRU"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_layout_of_cudnn(tmp_path: Path, rng: np.random.Generator, cls: str, whole: bool) -> None:
    arrays, x = arrays_of(cls, rng), inputs(rng)
    config = model(layer(cls, "rec")) if whole else None
    path = legacy(tmp_path / "m.h5", {"rec": named("rec", arrays)}, config)
    assert np.abs(answered(path, "rec", x) - run(cls, arrays, x)).max() < 1e-5
    # Read as the plain layer it would give other answers, and no error.
    other = [*arrays[:2], arrays[2].reshape(2, -1).sum(0) if cls == "CuDNNLSTM" else arrays[2].reshape(2, -1)]
    assert np.abs(run(cls.removeprefix("CuDNN"), other, x) - run(cls, arrays, x)).max() > 0.1


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("cls", some(["LSTM", "GRU", "SimpleRNN"], "GRU"))
def test_both_directions(tmp_path: Path, rng: np.random.Generator, cls: str, container: str) -> None:
    both = [arrays_of(cls, rng) for _ in range(2)]
    config = model(layer("Bidirectional", "bi", layer=layer(cls, "rec"), merge_mode="sum"))
    owned = {"bi": {**named("bi/forward_rec/cell", both[0]), **named("bi/backward_rec/cell", both[1])}}
    group = "layers/bidirectional"
    grouped = {f"{group}/{d}_layer/cell": arrays for d, arrays in zip(("forward", "backward"), both, strict=True)}
    path = tmp_path / "file"
    if "2" in container or container == "h5":
        legacy(path, owned, config if container == "h5" else None)
    else:
        modern(path, grouped, config if container == "keras" else None, {group: "bi"})
    x = inputs(rng)
    wanted = np.concatenate([run(cls, both[0], x), run(cls, both[1], x[:, ::-1])[:, ::-1]], axis=2)
    assert np.abs(answered(path, "bi", x) - wanted).max() < 1e-5


def test_directions_unlike_each_other_are_two_layers(tmp_path: Path, rng: np.random.Generator) -> None:
    forward, backward = arrays_of("LSTM", rng), arrays_of("GRU", rng, units=4)
    inner = {"layer": layer("LSTM", "a"), "backward_layer": layer("GRU", "b", go_backwards=True, reset_after=True)}
    owned = {"bi": {**named("bi/forward_a", forward), **named("bi/backward_b", backward)}}
    path = legacy(tmp_path / "m.h5", owned, model(layer("Bidirectional", "bi", **inner)))
    x = inputs(rng)
    assert np.abs(answered(path, "bi.forward", x) - run("LSTM", forward, x)).max() < 1e-5
    assert np.abs(answered(path, "bi.backward", x) - run("GRU", backward, x)).max() < 1e-5


def nested(place: Path, rng: np.random.Generator, container: str) -> tuple[Path, dict[str, list[Array]]]:
    """A model in a model, layers of one class at each level, a wrapper around one, and other layers."""
    weights = {"lstm": arrays_of("LSTM", rng), "inner.lstm_1": arrays_of("LSTM", rng, UNITS),
               "each": arrays_of("GRU", rng)}  # fmt: skip
    dense, seen, norm = rng.standard_normal((5, 4)), rng.standard_normal((9, 6)), rng.standard_normal((4, 5))
    inner = model(layer("LSTM", "lstm_1"), layer("BatchNormalization", "norm"), name="inner", cls="Functional")
    config = model(
        layer("Embedding", "seen"),
        layer("LSTM", "lstm"),
        inner,
        layer("TimeDistributed", "each", layer=layer("GRU", "gru", reset_after=True)),
        layer("Dense", "out", use_bias=False),
    )
    if container == "h5":
        roles = ("gamma", "beta", "moving_mean", "moving_variance")
        owned = {
            "seen": {"seen/embeddings:0": seen},
            "lstm": named("lstm_1_1/lstm_cell", weights["lstm"]),
            "inner": {**named("inner/lstm_1/lstm_cell", weights["inner.lstm_1"]), **named("inner/norm", norm, roles)},
            "each": named("each/gru_cell", weights["each"]),
            "out": {"out/kernel:0": dense},
        }
        legacy(place, owned, config, chunks=2, momentum=np.zeros((6, 20)))
    else:
        above = "layers/functional/layers"
        modern(place, {
            "layers/lstm/cell": weights["lstm"], f"{above}/lstm/cell": weights["inner.lstm_1"],
            f"{above}/batch_normalization": list(norm), "layers/time_distributed/layer/cell": weights["each"],
            "layers/dense": [dense], "layers/embedding": [seen],
        }, config)  # fmt: skip
    return place, {**weights, "out.weight": [dense.T], "seen.weight": [seen], "inner.norm.running_mean": [norm[2]]}


@pytest.mark.parametrize("container", ["h5", "keras"])
def test_models_in_models(tmp_path: Path, rng: np.random.Generator, container: str) -> None:
    path, weights = nested(tmp_path / "m", rng, container)
    for name, cls, width in (("lstm", "LSTM", INPUTS), ("inner.lstm_1", "LSTM", UNITS), ("each", "GRU", INPUTS)):
        x = inputs(rng, width)
        assert np.abs(answered(path, name, x) - run(cls, weights[name], x)).max() < 1e-5
    tensors = read_checkpoint(path).tensors
    for name in ("out.weight", "seen.weight", "inner.norm.running_mean"):
        assert np.array_equal(tensors[name].numpy(), weights[name][0])
    assert len(tensors) == 3 * 4 + 1 + 1 + 4


def test_weights_of_a_keras_whose_gates_were_others(tmp_path: Path, rng: np.random.Generator) -> None:
    """Hard sigmoids were the default of gates until Keras 2.3: weights alone do not say, and so the reader does."""
    said = {("2.2.4", "LSTM"): True, ("2.1.6-tf", "GRU"): True, ("2.2.4", "SimpleRNN"): False}
    said |= {("2.3.1", "LSTM"): False, ("3.1.0", "LSTM"): False, ("", "LSTM"): False}
    for (version, cls), expected in said.items():
        arrays = arrays_of(cls, rng)
        path = legacy(tmp_path / "w.h5", {"rec": named("rec", arrays)})
        whole = legacy(tmp_path / "m.h5", {"rec": named("rec", arrays)}, model(layer(cls, "rec", reset_after=True)))
        for place in (path, whole):
            with h5py.File(place, "r+") as file:
                file.attrs["keras_version"] = version
        assert ("had hard sigmoids unless they were told otherwise" in read_checkpoint(path).note) is expected
        assert not read_checkpoint(whole).note
    found = inspect_checkpoint(path)
    assert not found.note


LEFT = {
    "reset first": (layer("GRU", "rec", reset_after=False), "GRU", "reset_after=False"),
    "reset first, as older files do not say": (layer("GRU", "rec", use_bias=False), "GRU", "reset_after=False"),
    "hard gates": (layer("LSTM", "rec", recurrent_activation="hard_sigmoid"), "LSTM", "tanh and hard_sigmoid"),
    "as of Keras 3": (
        layer("LSTM", "rec", activation={"class_name": "function", "config": "softsign", "module": "builtins"}),
        "LSTM",
        "softsign and sigmoid",
    ),
    "elu": (layer("SimpleRNN", "rec", activation="elu"), "SimpleRNN", "the activation elu"),
    "with settings": (
        layer("SimpleRNN", "rec", activation={"class_name": "elu", "config": {"alpha": 0.3}}),
        "SimpleRNN",
        "the activation elu with settings of its own",
    ),
    "cells": (layer("RNN", "rec", cell=layer("MyCell", "c")), "LSTM", "runs MyCell step by step"),
    "another class": (layer("MyLSTM", "rec"), "LSTM", "is of the class MyLSTM"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_torch_has_not_is_named(tmp_path: Path, rng: np.random.Generator, case: str) -> None:
    config, cls, said = LEFT[case]
    owned = {
        "rec": named("rec/cell", arrays_of(cls, rng, **config["config"])),
        "good": named("good", arrays_of("LSTM", rng)),
    }
    path = legacy(tmp_path / "m.h5", owned, model(config, layer("LSTM", "good")))
    found = read_checkpoint(path)
    assert said in found.left["rec"]
    parts = ("kernel", "recurrent_kernel", "bias")[: 3 if config["config"].get("use_bias", True) else 2]
    assert {name for name in found.tensors if name.startswith("rec")} == {f"rec.{part}" for part in parts}
    del owned["good"]
    with pytest.raises(CheckpointError, match="None of the recurrent layers of"):
        read_checkpoint(legacy(tmp_path / "m.h5", owned, model(config)))


def test_a_convolution_with_a_state_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = [rng.standard_normal((3, 3, 2, 8)), rng.standard_normal((3, 3, 2, 8)), rng.standard_normal(8)]
    path = legacy(tmp_path / "m.h5", {"conv": named("conv", arrays)}, model(layer("ConvLSTM2D", "conv")))
    with pytest.raises(CheckpointError, match="conv is of the class ConvLSTM2D, which torch has not"):
        read_checkpoint(path)


@pytest.mark.parametrize("container", ["h5", "keras"])
def test_what_is_written_is_read(tmp_path: Path, rng: np.random.Generator, container: str) -> None:
    path, _ = nested(tmp_path / "m", rng, container)
    file = KerasFile.read(path)
    before = file.tensors()
    same, done = file.with_tensors(before)
    assert done == before.keys()
    assert all(torch.equal(before[name], value) for name, value in same.tensors().items())
    changed = {"lstm.weight_hh_l0": before["lstm.weight_hh_l0"] * 2, "out.weight": before["out.weight"] + 1}
    given = {**{n: t for n, t in before.items() if n.startswith("lstm.")}, **changed, "unknown": torch.zeros(2)}
    made, done = file.with_tensors(given)
    assert "unknown" not in done
    for name, value in made.tensors().items():
        assert torch.equal(value, changed.get(name, before[name]))
    if container == "keras":
        old, new = (zipfile.ZipFile(io.BytesIO(one.content)) for one in (file, made))
        assert [(i.filename, i.compress_type, i.date_time) for i in old.infolist()] == [
            (i.filename, i.compress_type, i.date_time) for i in new.infolist()
        ]
        assert old.read("config.json") == new.read("config.json")
    with pytest.raises(CheckpointError, match="has shape"):
        file.with_tensors({"out.weight": torch.zeros(3, 4)})


@pytest.mark.parametrize("cls", ["CuDNNLSTM", "CuDNNGRU", "LSTM", "GRU", "SimpleRNN"])
def test_every_layout_is_written(tmp_path: Path, rng: np.random.Generator, cls: str) -> None:
    arrays = arrays_of(cls, rng)
    path = legacy(tmp_path / "m.h5", {"rec": named("rec", arrays)}, model(layer(cls, "rec")))
    file = KerasFile.read(path)
    tensors = {name: torch.randn_like(value) for name, value in file.tensors().items()}
    again = file.with_tensors(tensors)[0].tensors()
    for name, value in tensors.items():
        if cls in ("LSTM", "SimpleRNN") and "bias" in name:
            continue
        assert torch.equal(again[name], value)
    total = tensors["rec.bias_ih_l0"] + tensors["rec.bias_hh_l0"]
    assert torch.allclose(again["rec.bias_ih_l0"] + again["rec.bias_hh_l0"], total)


def test_compressed_without_data(tmp_path: Path, rng: np.random.Generator, htc: Callable[..., Outcome]) -> None:
    nested(tmp_path / "m.h5", rng, "h5")
    ended = htc("inspect", "m.h5")
    assert ended.code == 0, ended.err
    assert "inner.lstm_1" in ended.out
    ended = htc("convert", "m.h5", "--ratio", "2", "-o", "out")
    assert ended.code == 0, ended.err


# ---- hostile and damaged files --------------------------------------------------------------------------------


def sound(path: Path) -> Path:
    return legacy(path, {"rec": named("rec", arrays_of("LSTM", np.random.default_rng(0)))}, model(layer("LSTM", "rec")))


def outer_link(file: h5py.File, place: Path) -> None:
    file["model_weights/rec/more"] = h5py.ExternalLink(str(place / "other.h5"), "/secret")


def inner_link(file: h5py.File, place: Path) -> None:
    file["model_weights/rec/more"] = h5py.SoftLink("/model_weights")


def outer_storage(file: h5py.File, place: Path) -> None:
    (place / "secret").write_bytes(bytes(80))
    file.create_dataset("more", (20,), "f4", external=[(str(place / "secret"), 0, 80)])


def virtual(file: h5py.File, place: Path) -> None:
    layout = h5py.VirtualLayout((20,), "f4")
    layout[:] = h5py.VirtualSource(str(place / "other.h5"), "secret", (20,))
    file.create_virtual_dataset("more", layout)


def circle(file: h5py.File, place: Path) -> None:
    file["model_weights/rec/again"] = file["model_weights"]


def boundless(file: h5py.File, place: Path) -> None:
    file.create_dataset("more", (1 << 40,), "f4", chunks=(1024,))


@pytest.mark.parametrize("harm", [outer_link, inner_link, outer_storage, virtual, circle, boundless])
def test_what_leads_elsewhere_is_refused(tmp_path: Path, harm: Callable[[h5py.File, Path], None]) -> None:
    path = sound(tmp_path / "m.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.ones(20, np.float32)
    read_checkpoint(path)
    with h5py.File(path, "r+") as file:
        harm(file, tmp_path)
    with pytest.raises(CheckpointError, match=r"is a link|in another file|damaged|more than"):
        read_checkpoint(path)


@pytest.mark.parametrize("make", [sound, lambda path: nested(path, np.random.default_rng(0), "keras")[0]])
def test_damaged_files_end_in_words(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "m")
    content = path.read_bytes()
    draw = np.random.default_rng(0)
    for length in range(8, len(content), len(content) // 23):
        path.write_bytes(content[:length])
        with pytest.raises(HTCompressError):
            read_checkpoint(path)
    for _ in range(60):
        broken = bytearray(content)
        for place in draw.integers(0, len(content), 8):
            broken[place] = draw.integers(256)
        path.write_bytes(broken)
        with suppress(HTCompressError):
            read_checkpoint(path)


def test_hdf5_of_others_is_told(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["temperatures"] = np.zeros(3)
    with pytest.raises(CheckpointError, match=r"an HDF5 file without weights of Keras in it; it holds temperatures"):
        read_checkpoint(tmp_path / "m.h5")
    with pytest.raises(CheckpointError, match="found weights 'ema' asked for"):
        read_checkpoint(sound(tmp_path / "n.h5"), weights="ema")

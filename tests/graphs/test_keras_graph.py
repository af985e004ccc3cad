"""Keras in, Keras out, held against Keras itself on torch: what its layers give, and what it makes of our files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keras_files import INPUTS, Array, arrays_of, hard_sigmoid, layer, legacy, model, modern, named, run
from small import Outcome

from htcompress.errors import CheckpointError
from htcompress.exporting.dense import dense_tensors
from htcompress.graphs.keras_graph import KerasGraph
from htcompress.graphs.keras_running import _with_older_activations
from htcompress.graphs.passing import entering_of, outputs_of
from htcompress.graphs.twins import Twins
from htcompress.report import read_report
from htcompress.sources.keras_file import KerasFile

os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras")
L = keras.layers

Command = Callable[..., Outcome]
Model = Any


@pytest.fixture(autouse=True)
def _names_from_the_start() -> None:
    keras.utils.set_random_seed(0)


def frames(count: int = 4, steps: int = 6, width: int = INPUTS) -> Array:
    return np.random.default_rng(1).standard_normal((count, steps, width)).astype(np.float32)


def functional(*layers: Any, shape: tuple[Any, ...] = (None, INPUTS)) -> Model:
    x = given = keras.Input(shape, name="given")
    for one in layers:
        x = one(x)
    return keras.Model(given, x)


def shuffled(made: Model) -> Model:
    """With biases that are not zero."""
    rng = np.random.default_rng(2)
    for variable in made.trainable_variables:
        variable.assign(rng.standard_normal(variable.shape).astype(np.float32) * 0.5)
    return made


def translator() -> Model:
    """An encoder whose states begin a decoder."""
    source, target = keras.Input((None, INPUTS), name="given"), keras.Input((None, INPUTS), name="target")
    _, h, c = L.LSTM(5, return_state=True, name="encoder")(source)
    y, *_ = L.LSTM(5, return_sequences=True, return_state=True, name="decoder")(target, initial_state=[h, c])
    return keras.Model([source, target], L.Dense(3)(y))


def shared() -> Model:
    """One layer that is called on sequences of two lengths."""
    one, given = L.GRU(4, return_sequences=True, name="shared"), keras.Input((6, INPUTS), name="given")
    a, b = one(given), one(L.Cropping1D((2, 0))(given))
    return keras.Model(given, L.Concatenate(axis=1)([a, b]))


def subtree() -> Model:
    inner = keras.Sequential([L.Input((None, 5)), L.GRU(4, return_sequences=True), L.Dense(3)], name="inner")
    return functional(L.LSTM(5, return_sequences=True), inner, L.SimpleRNN(3, name="last"))


def stateful() -> Model:
    given = keras.Input(batch_shape=(4, 6, INPUTS), name="given")
    return keras.Model(given, L.GRU(4, stateful=True, return_sequences=True)(given))


def both(cls: Any = L.LSTM, merge: str | None = "concat", **options: Any) -> Callable[[], Model]:
    return lambda: functional(L.Bidirectional(cls(4, **options), merge_mode=merge, name="bi"))


MODELS: dict[str, Callable[[], Model]] = {
    "lstm": lambda: functional(L.LSTM(5)),
    "lstm, sequences, no bias": lambda: functional(L.LSTM(5, return_sequences=True, use_bias=False)),
    "gru": lambda: functional(L.GRU(5, return_sequences=True)),
    "tanh": lambda: functional(L.SimpleRNN(5)),
    "relu": lambda: functional(L.SimpleRNN(5, activation="relu", return_sequences=True)),
    "backwards": lambda: functional(L.LSTM(5, go_backwards=True, return_sequences=True)),
    "stacked": lambda: functional(L.LSTM(5, return_sequences=True), L.LSTM(4, return_sequences=True), L.GRU(3)),
    "both, concatenated": both(return_sequences=True),
    "both, summed": both(L.GRU, "sum", return_sequences=True),
    "both, averaged": both(L.SimpleRNN, "ave"),
    "both, multiplied": both(L.GRU, "mul"),
    "both, apart": both(L.LSTM, None, return_sequences=True),
    "both, first backwards": lambda: functional(
        L.Bidirectional(
            L.LSTM(4, go_backwards=True, return_sequences=True), backward_layer=L.LSTM(4, return_sequences=True)
        )
    ),
    "both, unlike": lambda: functional(L.Bidirectional(L.LSTM(4), backward_layer=L.GRU(3, go_backwards=True))),
    "a wrapper": lambda: functional(L.TimeDistributed(L.LSTM(4)), shape=(3, 6, INPUTS)),
    "a wrapper of both": lambda: functional(L.TimeDistributed(L.Bidirectional(L.GRU(4))), shape=(3, 6, INPUTS)),
    "a cell": lambda: functional(L.RNN(L.GRUCell(4), return_sequences=True)),
    "models in models": subtree,
    "states": translator,
    "reset before": lambda: functional(L.GRU(5, reset_after=False, return_sequences=True)),
    "reset before, no bias": lambda: functional(L.GRU(5, reset_after=False, use_bias=False, go_backwards=True)),
    "hard gates": lambda: functional(L.LSTM(5, recurrent_activation="hard_sigmoid", activation="softsign")),
    "hard gates, a cell": lambda: functional(L.RNN(L.GRUCell(4, recurrent_activation="hard_sigmoid"))),
    "all at once": both(L.GRU, reset_after=False, recurrent_activation="hard_sigmoid", activation="relu"),
    "elu": lambda: functional(L.SimpleRNN(5, activation="elu", return_sequences=True)),
    "no activation": lambda: functional(L.LSTM(5, activation=None)),
    "called twice": shared,
    "stateful": stateful,
    "sequential": lambda: keras.Sequential([L.Input((None, INPUTS), name="given"), L.LSTM(3), L.Dense(2)]),
}
FULL = ("tanh", "both, averaged", "both, multiplied", "a wrapper", "stacked", "lstm")


def assert_proven(graph: KerasGraph, layers: int, **arrays: Array) -> dict[str, Array]:
    """Torch's modules give what Keras's layers do; returns what has passed."""
    assert len(graph.nodes) == layers
    session = graph.session(watched=True)
    (values,) = session.answers([arrays], {})
    twins = Twins(graph.nodes)
    for node in graph.nodes:
        with torch.no_grad():
            found = twins.outputs(node.name, entering_of(node, values))
        pairs = list(zip(found, outputs_of(node, values), strict=True))
        assert pairs
        for a, b in pairs:
            assert a.shape == b.shape
            assert float((a - b).abs().max()) < 1e-5, node.name
    return dict(values)


@pytest.mark.parametrize("case", [c if c not in FULL else pytest.param(c, marks=pytest.mark.full) for c in MODELS])
@pytest.mark.parametrize("suffix", [".keras", pytest.param(".h5", marks=pytest.mark.full)])
def test_torch_gives_what_keras_does(tmp_path: Path, case: str, suffix: str) -> None:
    made = shuffled(MODELS[case]())
    path = tmp_path / f"m{suffix}"
    made.save(path)
    x = frames() if "wrapper" not in case else np.stack([frames()] * 3, axis=1)
    arrays = {"given": x, "target": x[:, 1:]} if case == "states" else {"given": x}
    layers = {"stacked": 3, "both, unlike": 2, "states": 2, "models in models": 3}.get(case, 1)
    values = assert_proven(KerasGraph.read(path), layers, **arrays)
    given = [*arrays.values()] if len(arrays) > 1 else x
    wanted = keras.tree.flatten(made(given, training=False))
    for name, one in zip([k for k in values if k not in arrays and "/" not in k], wanted, strict=True):
        assert np.abs(values[name] - keras.ops.convert_to_numpy(one)).max() < 1e-5
    # What is written back is the same file to Keras.
    file = KerasFile.read(path)
    (tmp_path / f"again{suffix}").write_bytes(file.with_tensors(file.tensors())[0].content)
    again = keras.saving.load_model(tmp_path / f"again{suffix}")
    for a, b in zip(made.weights, again.weights, strict=True):
        assert np.array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))


MASKS = {
    "behind": lambda length: np.arange(7) < length,
    "before": lambda length: np.arange(7) >= 7 - length,
    "between": lambda length: (np.arange(7) * 5 % 7) < length,
}


@pytest.mark.parametrize("where", MASKS)
def test_masked_steps_are_not_there(tmp_path: Path, where: str) -> None:
    made = shuffled(
        functional(
            L.Embedding(20, 5, mask_zero=True),
            L.Bidirectional(L.LSTM(4, return_sequences=True)),
            L.GRU(3, return_sequences=True),
            L.SimpleRNN(3),
            shape=(None,),
        )
    )
    made.save(tmp_path / "m.keras")
    words = np.random.default_rng(0).integers(1, 20, (5, 7))
    words = np.stack([np.where(MASKS[where](n), row, 0) for n, row in zip((7, 4, 1, 0, 5), words, strict=True)])
    values = assert_proven(KerasGraph.read(tmp_path / "m.keras"), 3, given=words)
    # The sample without a step says nothing.
    lengths = [value.tolist() for name, value in values.items() if name.endswith("/lengths")]
    assert lengths == [[7, 4, 1, 5]] * 3


@pytest.mark.parametrize("cls", ["CuDNNLSTM", "CuDNNGRU"])
def test_older_layers_are_run_as_plain_ones(tmp_path: Path, cls: str) -> None:
    rng = np.random.default_rng(0)
    weights, dense = arrays_of(cls, rng), [rng.standard_normal(s).astype(np.float32) for s in ((5, 2), (2,))]
    config = model(
        layer(cls, "rec", return_sequences=True, batch_input_shape=[None, None, INPUTS]),
        layer("Dense", "out", units=2, activation="linear"),
    )
    for one in config["config"]["layers"][:1]:
        one["config"]["units"] = 5
    owned = {"rec": named("rec", weights), "out": named("out", dense, ("kernel", "bias"))}
    path = legacy(tmp_path / "m.h5", owned, config)
    x = frames()
    values = assert_proven(KerasGraph.read(path), 1, rec_input=x)
    assert np.abs(values["out"] - (run(cls, weights, x) @ dense[0] + dense[1])).max() < 1e-5


def test_settings_that_are_no_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lstm, gru = arrays_of("LSTM", rng), arrays_of("GRU", rng, 5, reset_after=False)
    config = model(
        layer("LSTM", "rec", units=5, return_sequences=True, time_major=False, batch_input_shape=[None, None, INPUTS]),
        layer("GRU", "old", units=5, return_sequences=True, recurrent_activation="sigmoid"),
    )
    path = legacy(tmp_path / "m.h5", {"rec": named("rec", lstm), "old": named("old", gru)}, config)
    x = frames()
    values = assert_proven(KerasGraph.read(path), 2, rec_input=x)
    assert np.abs(values["old"] - run("GRU", gru, run("LSTM", lstm, x))).max() < 1e-5


class Doubled(keras.layers.Layer):
    """A layer of somebody's own."""

    def call(self, x: Any) -> Any:
        return 2 * x


def test_names_with_slashes_and_classes_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lstm = arrays_of("LSTM", np.random.default_rng(0))
    shape = [None, None, INPUTS]
    config = model(
        layer("InputLayer", "given/x", batch_input_shape=shape),
        layer("LSTM", "first/rec", units=5, return_sequences=True),
        layer("Doubled", "own"),
    )
    path = legacy(tmp_path / "m.h5", {"first/rec": named("first/rec", lstm)}, config)
    x = frames()
    with pytest.raises(CheckpointError, match=r"'Doubled'.* by keras.saving.get_custom_objects\(\)\[name\] = cls"):
        KerasGraph.read(path).session()
    monkeypatch.setitem(keras.saving.get_custom_objects(), "Doubled", Doubled)
    values = assert_proven(KerasGraph.read(path), 1, **{"given/x": x})
    assert np.abs(values["own"] - 2 * run("LSTM", lstm, x)).max() < 1e-5


@pytest.mark.parametrize("backward", [False, True])
def test_layers_in_layers_of_older_files_name_no_module(tmp_path: Path, backward: bool) -> None:
    rng = np.random.default_rng(0)
    both = [arrays_of("LSTM", rng) for _ in range(2)]
    dense = [rng.standard_normal(s).astype(np.float32) for s in ((10, 2), (2,))]
    inner = layer("LSTM", "rec", units=5, return_sequences=True)
    other = layer("LSTM", "back", units=5, return_sequences=True, go_backwards=True)
    config = model(
        layer(
            "Bidirectional",
            "bi",
            layer=inner,
            merge_mode="concat",
            batch_input_shape=[None, None, INPUTS],
            **({"backward_layer": other} if backward else {}),
        ),
        layer("TimeDistributed", "each", layer=layer("Dense", "out", units=2, activation="linear")),
    )
    names = ("bi/forward_rec/cell", "bi/back/cell" if backward else "bi/backward_rec/cell")
    owned = {
        "bi": {
            key: array for name, arrays in zip(names, both, strict=True) for key, array in named(name, arrays).items()
        },
        "each": named("each", dense, ("kernel", "bias")),
    }
    path = legacy(tmp_path / "m.h5", owned, config)
    x = frames()
    values = assert_proven(KerasGraph.read(path), 1, bi_input=x)
    states = [run("LSTM", both[0], x), run("LSTM", both[1], x[:, ::-1])[:, ::-1]]
    assert np.abs(values["each"] - (np.concatenate(states, axis=2) @ dense[0] + dense[1])).max() < 1e-5


def test_hard_sigmoids_of_older_files_have_their_own_slope(tmp_path: Path) -> None:
    """The default of gates until Keras 2.3; version 3 has made it flatter, and would answer otherwise."""
    rng = np.random.default_rng(0)
    lstm, gru = arrays_of("LSTM", rng), arrays_of("GRU", rng, 5, reset_after=False)
    hard = {"units": 5, "return_sequences": True, "recurrent_activation": "hard_sigmoid"}
    dense = [rng.standard_normal(s).astype(np.float32) for s in ((5, 2), (2,))]
    config = model(
        layer("LSTM", "rec", **hard, batch_input_shape=[None, None, INPUTS]),
        layer("GRU", "old", **hard),
        layer("Dense", "out", units=2, activation="hard_sigmoid"),
    )
    owned = {"rec": named("rec", lstm), "old": named("old", gru), "out": named("out", dense, ("kernel", "bias"))}
    # Until Keras 2.2 the configuration of a Sequential is the list of its layers.
    config["config"] = config["config"]["layers"]
    path = legacy(tmp_path / "m.h5", owned, config)
    x = frames()
    values = assert_proven(KerasGraph.read(path), 2, rec_input=x)
    states = run("GRU", gru, run("LSTM", lstm, x, gate=hard_sigmoid), gate=hard_sigmoid)
    # Cells that are run together stay as they are, and are run as they were.
    cells = L.RNN([L.LSTMCell(5, recurrent_activation="hard_sigmoid"), L.GRUCell(5)])
    _with_older_activations(keras, cells)
    assert float(
        keras.ops.convert_to_numpy(cells.cell.cells[0].recurrent_activation(keras.ops.ones(1)))[0]
    ) == pytest.approx(0.7)
    assert np.abs(values["out"] - hard_sigmoid(states @ dense[0] + dense[1])).max() < 1e-5


def placed(node: Any) -> Any:
    """A configuration as `.keras` files of Keras 2 have it, with the modules of classes."""
    if isinstance(node, list):
        return [placed(part) for part in node]
    if not isinstance(node, dict):
        return node
    made = {key: placed(value) for key, value in node.items()}
    if "class_name" in made:
        engine = {"Functional": "keras.src.engine.functional", "Sequential": "keras.src.engine.sequential"}
        made |= {"module": engine.get(made["class_name"], "keras.layers"), "registered_name": None}
    return made


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_models_of_keras_2(tmp_path: Path, suffix: str) -> None:
    """A model in a model, whose calls Keras 2 counts from one."""
    rng = np.random.default_rng(0)
    lstm, gru = arrays_of("LSTM", rng), arrays_of("GRU", rng, 5)
    shape = [None, None, INPUTS]
    inner = model(
        layer("LSTM", "rec", units=5, return_sequences=True, time_major=False, batch_input_shape=shape), name="inner"
    )
    config = model(
        {**layer("InputLayer", "given", batch_input_shape=shape), "name": "given", "inbound_nodes": []},
        {**inner, "name": "inner", "inbound_nodes": [[["given", 0, 0, {}]]]},
        {**layer("GRU", "gru", units=5, reset_after=True, batch_input_shape=None), "name": "gru",
         "inbound_nodes": [[["inner", 1, 0, {}]]]},
        cls="Functional",
    )  # fmt: skip
    config["config"] |= {"input_layers": [["given", 0, 0]], "output_layers": [["gru", 0, 0]]}
    path = tmp_path / f"m{suffix}"
    if suffix == ".h5":
        legacy(path, {"given": {}, "inner": named("rec/cell", lstm), "gru": named("gru/cell", gru)}, config)
    else:
        modern(path, {"layers/sequential/layers/lstm/cell": lstm, "layers/gru/cell": gru}, placed(config))
    x = frames()
    values = assert_proven(KerasGraph.read(path), 2, given=x)
    assert np.abs(values["gru"] - run("GRU", gru, run("LSTM", lstm, x))[:, -1]).max() < 1e-5


# ---- the command line -------------------------------------------------------------------------------------------


def smooth(count: int = 16) -> Array:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((count, 5, 4)).cumsum(1) @ rng.standard_normal((4, INPUTS)) / 3).astype(np.float32)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, compiled and trained a little, in both formats, and data for it."""
    place = tmp_path_factory.mktemp("keras")
    keras.utils.set_random_seed(0)
    made = functional(
        L.Bidirectional(L.LSTM(8, return_sequences=True), name="bi"), L.GRU(6, name="gru"), L.Dense(3, name="out")
    )
    made.compile("adam", "mse")
    made.fit(smooth(), np.zeros((16, 3)), verbose=0)
    for suffix in ("keras", "h5"):
        made.save(place / f"tagger.{suffix}")
    made.save_weights(place / "tagger.weights.h5")
    wanted = keras.ops.convert_to_numpy(made(smooth(), training=False)).argmax(-1)
    np.savez(place / "x.npz", given=smooth(), wanted=wanted)
    np.savez(place / "only.npz", given=smooth())
    return place


@pytest.fixture
def here(tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(tagger, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(path: Path, x: Array) -> Array:
    made = keras.saving.load_model(path, compile=False)
    return np.asarray(keras.ops.convert_to_numpy(made(x, training=False)))


@pytest.mark.parametrize("suffix", ["keras", pytest.param("h5", marks=pytest.mark.full)])
def test_convert(htc: Command, here: Path, suffix: str) -> None:
    options = ("--budget", "2kB", "--calibration", "only.npz", "--steps", "10", "--layout", "svd")
    ended = htc("convert", f"tagger.{suffix}", *options, "-o", "out")
    assert ended.code == 0, ended.err
    report = read_report(here / "out")
    assert report.source["format"] == "keras"
    assert [layer.name for layer in report.layers] == ["bi", "gru"]
    quality = report.quality
    assert quality.metric == "output_error"
    assert quality.finetuned is not None
    assert 0 < quality.finetuned < 0.1
    assert report.totals.bytes_after <= 2000
    # What is measured is what is written, on the samples that are kept apart.
    x = smooth()[-4:]
    wanted, found = answers(here / f"tagger.{suffix}", x), answers(here / "out" / f"model.{suffix}", x)
    error = np.sqrt(np.square(found - wanted).sum() / np.square(wanted - wanted.mean()).sum())
    assert error == pytest.approx(quality.finetuned, rel=1e-3)
    ended = htc("evaluate", "out", "--calibration", "only.npz", "--json")
    assert json.loads(ended.out)["output_error"] == pytest.approx(quality.finetuned, rel=0.6)
    assert htc("check", "out", "--max-bytes", "2k", "--max-drop", "1").code == 0
    assert htc("check", "out", "--max-metric", "0.0001").code == 1
    # The export is the file that stands there already, and takes its original from elsewhere.
    (here / f"tagger.{suffix}").rename(here / "moved")
    ended = htc("export", "out", f"back.{suffix}", "--to", "keras")
    assert ended.code == 2
    assert "is not found. Give it with --original" in ended.err
    ended = htc("export", "out", f"back.{suffix}", "--to", "keras", "--original", "moved")
    assert ended.code == 0, ended.err
    assert (here / f"back.{suffix}").read_bytes() == (here / "out" / f"model.{suffix}").read_bytes()
    ended = htc("export", "out", "back.txt", "--to", "keras", "--original", "moved")
    assert ended.code == 2
    assert f"ends in .{suffix}" in ended.err
    ended = htc("export", "out", f"back.{suffix}", "--to", "keras", "--original", "tagger.weights.h5")
    assert ended.code == 2
    assert "is not the file" in ended.err


@pytest.mark.full
def test_targets(htc: Command, here: Path) -> None:
    options = ("--ratio", "2", "--calibration", "x.npz", "--targets", "wanted", "--no-finetune")
    ended = htc("convert", "tagger.keras", *options, "-o", "out")
    assert ended.code == 0, ended.err
    quality = read_report(here / "out").quality
    assert (quality.metric, quality.dense) == ("accuracy", 1.0)
    options = ("--calibration", "x.npz", "--targets", "wanted", "--json")
    assert json.loads(htc("evaluate", "tagger.h5", *options).out) == {"accuracy": 1.0}


@pytest.mark.full
def test_beyond_need_nothing_is_lost(htc: Command, here: Path) -> None:
    options = ("--budget", "1m", "--calibration", "only.npz", "--no-finetune")
    assert htc("convert", "tagger.keras", *options, "-o", "out").code == 0
    quality = read_report(here / "out").quality
    assert quality.decomposed is not None
    assert quality.decomposed < 1e-5
    wanted, found = (answers(here / place, smooth()) for place in ("tagger.keras", "out/model.keras"))
    assert np.abs(found - wanted).max() < 1e-5


TASK = """
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.bi = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 6, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.gru(self.bi(x)[0])[0][:, -1])


def model():
    return Tagger()


def calibration():
    yield from torch.randn(4, 8, 5, 6, generator=torch.Generator().manual_seed(0))
"""


@pytest.mark.parametrize("name", ["tagger.weights.h5", pytest.param("tagger.keras", marks=pytest.mark.full)])
def test_with_a_task_and_back(htc: Command, here: Path, name: str) -> None:
    """The weights go into a model of torch, are tuned with all others there, and all go back into the file."""
    (here / "task.py").write_text(TASK)
    ended = htc("convert", name, "--ratio", "2", "--task", "task.py", "--steps", "5", "--layout", "svd", "-o", "out")
    assert ended.code == 0, ended.err
    back = f"back{name.removeprefix('tagger')}"
    ended = htc("export", "out", back, "--to", "keras")
    assert ended.code == 0, ended.err
    assert "left out" not in ended.out
    scope: dict[str, Any] = {}
    exec(TASK, scope)
    ours = scope["model"]()
    ours.load_state_dict(dense_tensors(here / "out"))
    theirs = keras.saving.load_model(here / "tagger.keras")
    before = keras.ops.convert_to_numpy(theirs(smooth()))
    if name.endswith(".weights.h5"):
        theirs.load_weights(here / back)
    else:
        theirs = keras.saving.load_model(here / back)
    found = keras.ops.convert_to_numpy(theirs(smooth()))
    with torch.no_grad():
        wanted = ours(torch.from_numpy(smooth())).numpy()
    assert np.abs(found - wanted).max() < 1e-5
    assert np.abs(found - before).max() > 1e-3


def test_what_makes_no_sense(htc: Command, here: Path) -> None:
    (here / "task.py").write_text(TASK)
    for given, said in (
        (("tagger.weights.h5", "--calibration", "only.npz"), "tagger.weights.h5 is none. Name its class with --model"),
        (("tagger.keras", "--calibration", "only.npz", "--task", "task.py"), "leave out one of them"),
        (("tagger.keras", "--device", "cuda", "--calibration", "only.npz"), "leave out --weights and --device"),
        (("tagger.h5", "--calibration", "x.npz"), "holds given, wanted; the model's inputs are given (any, any, 6)"),
    ):
        ended = htc("convert", *given, "--ratio", "2", "-o", "out")
        assert ended.code == 2, ended.out
        assert said in ended.err


@pytest.mark.full
def test_weights_alone(htc: Command, here: Path) -> None:
    ended = htc("convert", "tagger.weights.h5", "--ratio", "2", "-o", "out")
    assert ended.code == 0, ended.err
    ended = htc("export", "out", "back.weights.h5", "--to", "keras")
    assert ended.code == 0, ended.err
    keras.saving.load_model(here / "tagger.keras").load_weights(here / "back.weights.h5")


LAMBDA = {"class_name": "__lambda__", "config": {"code": "4wAAAA==", "defaults": None, "closure": None}}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (layer("Lambda", "code", function=["4wAAAA==", None, None], function_type="lambda"), "a Lambda layer"),
        (layer("Lambda", "code", function=LAMBDA), "a Lambda layer"),
        ({**layer("system", "code"), "module": "os"}, "system of the package os"),
    ],
)
def test_code_of_a_file_is_not_run(htc: Command, here: Path, extra: dict[str, Any], said: str) -> None:
    rng = np.random.default_rng(0)
    config = model(layer("LSTM", "rec", units=5, batch_input_shape=[None, None, INPUTS]), extra)
    weights = arrays_of("LSTM", rng)
    legacy(here / "code.h5", {"rec": named("rec", weights), "code": {}}, config)
    modern(here / "code.keras", {"layers/lstm/cell": weights}, config)
    for name in ("code.h5", "code.keras"):
        ended = htc("convert", name, "--ratio", "2", "--calibration", "only.npz")
        assert ended.code == 2
        assert said in ended.err
        assert "which is not run" in ended.err
    assert htc("inspect", "code.h5").code == 0


def test_another_backend(htc: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    ended = htc("convert", "tagger.keras", "--ratio", "2", "--calibration", "only.npz")
    assert ended.code == 2
    assert "Keras runs on jax already. Set the environment variable KERAS_BACKEND=torch" in ended.err


def test_packages_that_lack(htc: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    ended = htc("inspect", "tagger.h5")
    assert ended.code == 2
    assert "needs the package h5py: pip install 'htcompress[keras]'" in ended.err


BESIDE = """
import numpy as np

X = dict(np.load("only.npz"))["given"]


def calibration():
    for k in range(0, 12, 2):
        yield X[k : k + 2, : 3 + k // 4]


def evaluate(model):
    return {"largest": float(model(given=X[12:]).max())}
"""


def test_with_a_task_beside(htc: Command, here: Path) -> None:
    """A task without model() is beside the file, which Keras runs; in torch nobody has to write it again."""
    (here / "own.py").write_text(BESIDE)
    ended = htc("convert", "tagger.keras", "--ratio", "2", "--task", "own.py", "--steps", "5", "-o", "out")
    assert ended.code == 0, ended.err
    quality = read_report(here / "out").quality
    for name, wanted in (("tagger.keras", quality.dense), ("out/model.keras", quality.finetuned)):
        assert wanted == pytest.approx(answers(here / name, smooth()[12:]).max(), rel=1e-4)
    ended = htc("evaluate", "out", "--task", "own.py", "--json")
    assert json.loads(ended.out)["largest"] == pytest.approx(quality.finetuned, rel=1e-4)

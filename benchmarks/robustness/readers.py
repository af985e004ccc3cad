"""What the fuzzer hands its inputs to: every reader of the package, each behind a name, with its hostile inputs."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import corpus
import torch
from torch import nn

import htcompress
from htcompress.checks import config as gate
from htcompress.checks import verdict, views
from htcompress.directory.read import read_config
from htcompress.directory.structure import check_config
from htcompress.errors import CheckpointError
from htcompress.model.inventory import inventory, names_of
from htcompress.report import model_card, read_report, to_html, to_markdown
from htcompress.report.html import study_to_html
from htcompress.report.study import Case, Dense, Point, Study
from htcompress.report.terminal import to_terminal
from htcompress.sources.read import read_checkpoint
from htcompress.task import metrics_of

try:
    from htcompress.data import arguments, training_item
except ImportError:
    from htcompress.task import arguments, training_item


class Model(nn.Module):
    """The model of the directory that is fuzzed: two layers in HT form, one of them of three leaves or more."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(24, 16, num_layers=2)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


class Bomb:
    """Unpickling it with Python's own pickle makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ.get("FUZZ_MARKER", "fuzz-marker"),)


@dataclass(frozen=True)
class Reader:
    """`make` gives an input's bytes, `read` takes them; `share` is how often it is drawn."""

    make: Callable[[random.Random], bytes]
    read: Callable[[bytes, Path], object]
    share: int = 1


@cache
def directory() -> dict[str, bytes]:
    """The files of a sound output directory."""
    import tempfile

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "out"
        htcompress.save(htcompress.compress(Model(), budget=1500), place)
        return {file.name: file.read_bytes() for file in place.iterdir()}


def saved(value: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


@cache
def sound(legacy: bool = False, protocol: int = 2) -> bytes:
    torch.manual_seed(0)
    state = {"state_dict": Model().state_dict(), "epoch": 3, "optimizer": {"param_groups": [{"lr": 0.1}], "state": {}}}
    return saved(state, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)


def archive(rng: random.Random) -> bytes:
    whole = sound(protocol=rng.choice([2, 2, 4, 5]))
    kind = rng.randrange(4)
    if kind == 0:
        return corpus.bytewise(whole, rng)
    if kind == 1:
        return corpus.rezipped(whole, lambda data: corpus.operated(data, rng), "data.pkl")
    if kind == 2:
        return corpus.rezipped(whole, lambda data: corpus.bytewise(data, rng), rng.choice(["data.pkl", "data/0"]))
    bomb = zipfile.ZIP_DEFLATED if rng.random() < 0.3 else zipfile.ZIP_STORED
    return corpus.rezipped(whole, lambda data: data + bytes(rng.choice([0, 10, 1 << 16])), "data.pkl", bomb)


def legacy(rng: random.Random) -> bytes:
    whole = sound(legacy=True, protocol=rng.choice([2, 2, 4]))
    pickles = len(whole) - sum(t.numel() * 4 + 8 for t in Model().state_dict().values())
    if rng.random() < 0.5:
        return corpus.operated(whole[:pickles], rng) + whole[pickles:] if rng.random() < 0.5 else whole[:pickles]
    return corpus.bytewise(whole, rng, 0, pickles if rng.random() < 0.8 else None)


def objects(rng: random.Random) -> bytes:
    torch.manual_seed(rng.getrandbits(32))
    how = {"_use_new_zipfile_serialization": rng.random() < 0.7, "pickle_protocol": rng.choice([2, 2, 3, 4, 5])}
    for _ in range(5):
        try:
            state = corpus.stated(rng)
            return saved([state, {"model": state, "x": Bomb()}, state, state, state][rng.randrange(5)], **how)
        except (RuntimeError, TypeError, ValueError, RecursionError, NotImplementedError, KeyError, OverflowError):
            continue  # not everything can be saved
    return sound()


@cache
def dense() -> bytes:
    """A safetensors file of the dense model."""
    from safetensors.torch import save

    torch.manual_seed(0)
    return save(dict(Model().state_dict()), {"format": "pt", "tied.weight": "head.weight"})


def safetensors(whole: Callable[[], bytes]) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return corpus.headed(whole(), rng)
        return corpus.bytewise(whole(), rng, 0, rng.choice([16, 2000]))

    return make


def read_any_checkpoint(data: bytes, folder: Path) -> None:
    path = folder / "model.bin"
    path.write_bytes(data)
    read = read_checkpoint(path)
    for key in read.others[:2]:
        read_checkpoint(path, weights=key)
    for tensor in read.tensors.values():
        tensor.clone()
    layers = inventory(read.tensors, source=str(path), on_left=lambda name, why: None)
    for layer in layers:
        names_of(layer, read.tensors)
        for direction in layer.directions.values():
            _ = direction.parameters, direction.ih.sum()


def _json(name: str) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        text = directory()[name] if name != "study.json" else _study().to_json().encode()
        if rng.random() < 0.15:
            return corpus.bytewise(text, rng)
        try:
            return json.dumps(corpus.restructured(json.loads(text), rng)).encode()
        except RecursionError:
            return text

    return make


def read_directory(changed: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        place = folder / "out"
        place.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (place / name).write_bytes(data if name == changed else directory()[name])
        from htcompress.directory.read import read_tensors

        # As `load` does it: first the structure, then what is built of it.
        check_config(read_config(place), str(place / "config.json"), read_tensors(place))
        compact = htcompress.load(place, Model())
        compact.eval()

    return read


def read_any_report(data: bytes, folder: Path) -> None:
    from rich.console import Console

    (folder / "report.json").write_bytes(data)
    report = read_report(folder)
    console = Console(width=80, file=io.StringIO())
    console.print(to_terminal(report))
    (folder / "report.md").write_text(to_markdown(report) + model_card(report), encoding="utf-8")
    report.to_json()
    if len(data) % 8 == 0:  # drawing takes long
        (folder / "report.html").write_text(to_html(report), encoding="utf-8")
    (folder / "pyproject.toml").write_bytes(corpus.TOML.replace("old.json", "report2.json").encode())
    (folder / "report2.json").write_bytes(data)
    judged = verdict.judge(gate.read_targets(folder, names=["tagger"], config=folder / "pyproject.toml"))
    console.print(views.to_terminal(judged))
    for view in (views.to_json, views.to_junit, views.to_markdown, views.to_annotations):
        view(judged)


def read_configuration(data: bytes, folder: Path) -> None:
    (folder / "pyproject.toml").write_bytes(data)
    targets = gate.read_targets(config=folder / "pyproject.toml")
    for view in (views.to_json, views.to_junit, views.to_markdown, views.to_annotations):
        view(verdict.judge(targets))


def _study() -> Study:
    points = [
        Point(Case("ht", budget=500), 490, 8.0, 1960, 0.2, 0.8, 0.9, 1.5, 3.0),
        Point(Case("svd", budget=9), least=300),
    ]
    dense = Dense(4000, 16000, 0.95, 2.0)
    source, request = {"file": "model.pt"}, {"seed": 0, "steps": 10}
    return Study("sweep", "0.1.0", source, request, "accuracy", True, "1 thread", dense, tuple(points))


def read_study(data: bytes, folder: Path) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(str(error)) from error
    study = Study.from_json(text)
    study.to_json()
    study.best_first()
    if len(data) % 8 == 0:
        study_to_html(study)


class Awkward:
    """Raises whatever is asked of it."""

    def __float__(self) -> float:
        raise RuntimeError("no float")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _value(rng: random.Random, depth: int = 0) -> Any:
    import numpy as np

    plain: list[Callable[[], Any]] = [
        lambda: rng.choice(corpus.VALUES),
        lambda: torch.zeros(rng.choice([(), (1,), (3,), (0,)]), dtype=rng.choice([torch.float32, torch.int64])),
        lambda: torch.tensor(1 + 2j),
        lambda: torch.zeros((), device="meta"),
        lambda: torch.zeros(2).to_sparse(),
        lambda: torch.ones(1).expand(10**9),
        lambda: Fraction(1, 3),
        lambda: 10**400,
        lambda: 10**5000,
        lambda: np.float64(0.5),
        lambda: np.zeros(rng.choice([0, 1, 3])),
        lambda: b"bytes",
        lambda: 1j,
        Awkward,
        object,
        lambda: iter([1, 2]),
        lambda: nn.utils.rnn.pack_sequence([torch.zeros(2, 3)]),
    ]
    if depth < 3 and rng.random() < 0.5:
        inner = [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        kind = rng.randrange(4)
        if kind == 3:
            return {rng.choice(["accuracy", "loss", 3, None, (1, 2)]): value for value in inner}
        return (list, tuple, dict.fromkeys)[kind](inner if kind != 2 else ["a", "b"])
    return rng.choice(plain)()


def read_values(data: bytes, folder: Path) -> None:
    rng = random.Random(data.decode("utf-8", "replace"))
    value = _value(rng)
    arguments(value)
    training_item(value)
    metrics_of(value, source="task.py")


def warm() -> None:
    """Make and read sound inputs of every kind, so that later ones take what they take themselves."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for data in (sound(), sound(legacy=True), dense()):
            read_any_checkpoint(data, place)
        read_directory("config.json")(directory()["config.json"], place)
        report = directory()["report.json"]
        read_any_report(report + b" " * (-len(report) % 8), place)
        study = _study().to_json().encode()
        read_study(study + b" " * (-len(study) % 8), place)
        read_configuration(corpus.TOML.encode(), place)


READERS: dict[str, Reader] = {
    "torch archive": Reader(archive, read_any_checkpoint, 4),
    "torch before 1.6": Reader(legacy, read_any_checkpoint, 3),
    "objects saved": Reader(objects, read_any_checkpoint, 4),
    "safetensors": Reader(safetensors(dense), read_any_checkpoint, 3),
    "config.json": Reader(_json("config.json"), read_directory("config.json"), 4),
    "its tensors": Reader(
        safetensors(lambda: directory()["model.safetensors"]), read_directory("model.safetensors"), 2
    ),
    "report.json": Reader(_json("report.json"), read_any_report, 3),
    "pyproject.toml": Reader(corpus.configured, read_configuration, 2),
    "study.json": Reader(_json("study.json"), read_study, 1),
    "a task's values": Reader(lambda rng: str(rng.getrandbits(64)).encode(), read_values, 1),
}

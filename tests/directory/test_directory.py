"""The output directory: written whole or not at all, and read back as it was written."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from small import CLASSES, HIDDEN, INPUTS, Tagger, clips, equal, listing, save_tagger, tagger
from torch import nn
from torch.nn.utils import parametrizations

import htcompress
from htcompress import Compressed
from htcompress.directory import write as writing
from htcompress.directory.read import config_of, load, read_config, read_tensors
from htcompress.directory.write import check_writable
from htcompress.errors import CheckpointError, RequestError
from htcompress.nn import HTRecurrent
from htcompress.report import read_report
from htcompress.request import Goal
from htcompress.vocabulary import LayoutKind

FILES = {"model.safetensors", "config.json", "report.json", "report.md", "report.html", "README.md"}

MODULES: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "lstm": (nn.LSTM(10, 6), {"scope": "integrated"}),
    "gru": (nn.GRU(10, 6), {"scope": "integrated"}),
    "rnn": (nn.RNN(10, 6), {"scope": "separate"}),
    "relu": (nn.RNN(10, 6, nonlinearity="relu"), {"scope": "input"}),
    "layers": (nn.GRU(10, 6, num_layers=2, bidirectional=True), {}),
    "no bias": (nn.LSTM(10, 6, bias=False, bidirectional=True), {"scope": "separate"}),
    "projected": (nn.LSTM(10, 6, num_layers=2, proj_size=3), {}),
    "lstm cell": (nn.LSTMCell(10, 6), {}),
    "gru cell": (nn.GRUCell(10, 6), {"scope": "separate"}),
    "rnn cell": (nn.RNNCell(10, 6, bias=False), {}),
    "double": (nn.LSTM(10, 6).double(), {}),
    "dense": (nn.LSTM(4, 2), {"ratio": 1}),
}


def flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in flat(part)]


@pytest.fixture
def written(tmp_path: Path, compressed: Compressed) -> Path:
    htcompress.save(compressed, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", MODULES)
def test_load_is_the_inverse_of_save(case: str, tmp_path: Path) -> None:
    module, options = MODULES[case]
    module.eval()
    made = htcompress.compress(module, **{"ratio": 1.5, "layout": "svd"} | options)
    htcompress.save(made, tmp_path / "out")
    blank = copy.deepcopy(module)
    for parameter in blank.parameters():
        parameter.data.zero_()
    back = load(tmp_path / "out", blank)
    dtype = next(module.parameters()).dtype
    x = (
        torch.randn(2, 10, dtype=dtype)
        if "cell" in case
        else torch.randn(5, 2, 10 if case != "dense" else 4, dtype=dtype)
    )
    assert made.model is not None
    with torch.no_grad():
        for a, b in zip(flat(back(x)), flat(made.model(x)), strict=True):
            assert torch.equal(a, b)
    assert equal(back.state_dict(), made.model.state_dict())
    assert isinstance(back, HTRecurrent)
    assert config_of({"": back}) == made.config == read_config(tmp_path / "out")
    assert made.report.totals.parameters_after == sum(t.numel() for t in read_tensors(tmp_path / "out").values())
    assert all(not p.any() for p in blank.parameters())


def test_a_model_around_it(written: Path, compressed: Compressed) -> None:
    model = Tagger()
    before = copy.deepcopy(model.state_dict())
    back = load(str(written), model)
    assert compressed.model is not None
    assert torch.equal(back(clips()), compressed.model(clips()))
    assert equal(model.state_dict(), before)
    assert isinstance(back, Tagger)
    assert isinstance(back.rnn, HTRecurrent)


def test_what_is_in_it(written: Path, compressed: Compressed) -> None:
    assert {path.name for path in written.iterdir()} == FILES
    assert read_report(written) == compressed.report
    assert json.loads((written / "config.json").read_text()) == compressed.config
    assert equal(load_file(written / "model.safetensors"), compressed.tensors)
    with safe_open(written / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert compressed.report.source["file"] in (written / "README.md").read_text()


def test_scales_are_no_parameters() -> None:
    """Of a model in few bits neither the layers' numbers nor the model's count what codes are multiplied by."""
    made = htcompress.compress(tagger(), ratio=6, bits=4)
    assert made.model is not None
    totals = made.report.totals
    assert any(name.endswith("_scales") for name in made.model.state_dict())
    rest = totals.model_parameters_before - totals.parameters_before
    assert totals.model_parameters_after == totals.parameters_after + rest


def test_counts_are_those_of_the_file(written: Path, compressed: Compressed) -> None:
    tensors = load_file(written / "model.safetensors")
    totals = compressed.report.totals
    recurrent = [tensor for name, tensor in tensors.items() if name.startswith("rnn.")]
    assert totals.parameters_after == sum(t.numel() for t in recurrent) <= 400
    assert totals.bytes_after == sum(t.numel() * t.element_size() for t in recurrent)
    assert totals.model_parameters_after == sum(t.numel() for t in tensors.values())
    dense = tagger().state_dict()
    assert totals.parameters_before == sum(t.numel() for name, t in dense.items() if name.startswith("rnn."))
    assert totals.model_parameters_before == sum(t.numel() for t in dense.values())
    assert totals.bytes_before == 4 * totals.parameters_before


def test_files_bear_the_users_permissions(tmp_path: Path, compressed: Compressed) -> None:
    mask = os.umask(0o027)
    try:
        htcompress.save(compressed, tmp_path / "out")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


# ---- what the instance decides ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_instances(written: Path, training: bool) -> None:
    back = load(written, Tagger().train(training))
    assert {module.training for module in back.modules()} == {training}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_the_instances(written: Path, dtype: torch.dtype) -> None:
    back = load(written, Tagger().to(dtype))
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert back(clips().to(dtype)).dtype == dtype


def test_a_model_in_float64_is_kept_whole(tmp_path: Path) -> None:
    class Normed(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(super().forward(x))

    model = Normed().double().eval()
    made = htcompress.compress(model, budget=400, layout="svd")
    htcompress.save(made, tmp_path / "out")
    back = load(tmp_path / "out", Normed().double().eval())
    assert made.model is not None
    assert torch.equal(back(clips().double()), made.model(clips().double()))


def test_settings_that_a_checkpoint_does_not_tell_are_the_instances(tmp_path: Path) -> None:
    trained = nn.RNN(10, 6, num_layers=2)
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    made = htcompress.convert(tmp_path / "model.pt", goal=htcompress.Goal(budget=140, layout=LayoutKind.SVD))
    htcompress.save(made, tmp_path / "out")
    back = load(tmp_path / "out", nn.RNN(10, 6, num_layers=2, batch_first=True, dropout=0.25, nonlinearity="relu"))
    assert (back.batch_first, back.dropout, back.nonlinearity) == (True, 0.25, "relu")


# ---- what does not fit --------------------------------------------------------------------------------------


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, HIDDEN)


class Wider(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, CLASSES + 1)


class Longer(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(CLASSES, CLASSES)


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(INPUTS, HIDDEN, batch_first=True)


class Gated(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(INPUTS, HIDDEN, batch_first=True)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Other(), ["has a compressed layer 'rnn'; the model has 'lstm'"]),
        (nn.Linear(2, 2), ["has a compressed layer 'rnn'; the model has none"]),
        (Tagger(hidden=9), ["Layer 'rnn'", "hidden_size: 8 in the directory, 9 here"]),
        (Gated(), ["kind: lstm in the directory, gru here"]),
        (Wider(), ["has head.weight of shape (3, 8), the model (4, 8)"]),
        (Longer(), ["it lacks tail.weight; it lacks tail.bias"]),
        (Headless(), ["it has head.bias, unknown to the model; it has head.weight"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_another_model_is_told(written: Path, model: nn.Module, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(written, model)
    for word in [*words, str(written), "the class that the checkpoint was trained with"]:
        assert word in str(caught.value)


def test_tensors_beside_the_model_are_left_out_where_asked(written: Path, compressed: Compressed) -> None:
    back = load(written, Headless(), strict=False)
    assert compressed.model is not None
    assert torch.equal(back.rnn(clips())[0], compressed.model.rnn(clips())[0])
    with pytest.raises(CheckpointError, match="lacks tail"):
        load(written, Longer(), strict=False)


AGAIN = "Convert the model again"


def edit(path: Path, *keys: str | int, value: Any) -> None:
    data = json.loads(path.read_text())
    at = data
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(data))


LAYER = ("layers", "rnn")
BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no config": ("config.json", Path.unlink, "it has no config.json"),
    "empty config": ("config.json", lambda p: p.write_text(""), "is not valid"),
    "cut config": ("config.json", lambda p: p.write_text(p.read_text()[:200]), "is not valid"),
    "noise": ("config.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "is not valid"),
    "list": ("config.json", lambda p: p.write_text("[]"), "has the format None"),
    "later format": (
        "config.json",
        lambda p: edit(p, "format", value="htcompress.model/2"),
        "has the format 'htcompress.model/2'; this version reads 'htcompress.model/1'",
    ),
    "no layers": ("config.json", lambda p: p.write_text('{"format": "htcompress.model/1"}'), AGAIN),
    "layers a list": ("config.json", lambda p: edit(p, "layers", value=[1]), AGAIN),
    "no settings": ("config.json", lambda p: edit(p, *LAYER, value={}), AGAIN),
    "unknown kind": ("config.json", lambda p: edit(p, *LAYER, "settings", "kind", value="mamba"), AGAIN),
    "odd setting": ("config.json", lambda p: edit(p, *LAYER, "settings", "colour", value=1), AGAIN),
    "no weights": ("config.json", lambda p: edit(p, *LAYER, "weights", value={}), AGAIN),
    "odd weights": ("config.json", lambda p: edit(p, *LAYER, "weights", "l0", value=3), AGAIN),
    "no tensors": ("model.safetensors", Path.unlink, "cannot be read"),
    "cut tensors": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-40]), "cannot be read"),
    "empty tensors": ("model.safetensors", lambda p: p.write_bytes(b""), "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_directory_is_told(case: str, written: Path) -> None:
    name, damage, words = BROKEN[case]
    damage(written / name)
    with pytest.raises(CheckpointError) as caught:
        load(written, Tagger())
    assert words in str(caught.value)
    assert str(written) in str(caught.value)
    assert "onvert" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "has no report.json"),
        (lambda p: p.write_bytes(b"\xff"), "cannot be read"),
        (lambda p: p.write_text("{"), "is not a report of htcompress"),
    ],
)
def test_a_damaged_report_is_told(written: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(written / "report.json")
    with pytest.raises(CheckpointError, match=words):
        read_report(written)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no directory .*none"):
        load(tmp_path / "none", Tagger())
    with pytest.raises(CheckpointError, match="is not an output directory"):
        load(save_tagger(tmp_path / "model.pt"), Tagger())


# ---- where it is written ------------------------------------------------------------------------------------


def foreign(place: Path) -> Path:
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    return place


def a_file(place: Path) -> Path:
    place.write_text("mine")
    return place


@pytest.mark.parametrize(
    ("prepare", "inside", "words"),
    [
        (foreign, "", "is not one of htcompress, so it is left as it is"),
        (a_file, "", "is a file; give a directory with -o"),
        (a_file, "deep/out", "is a file, so the output"),
    ],
)
def test_what_is_not_ours_is_left_alone(
    tmp_path: Path, compressed: Compressed, prepare: Callable[[Path], Path], inside: str, words: str
) -> None:
    place = prepare(tmp_path / "place") / inside
    before = listing(tmp_path)
    for attempt in (lambda: check_writable(place), lambda: htcompress.save(compressed, place)):
        with pytest.raises(RequestError, match=words) as caught:
            attempt()
        assert str(tmp_path / "place") in str(caught.value)
    assert listing(tmp_path) == before


def test_a_folder_without_permission(tmp_path: Path, compressed: Compressed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RequestError, match="cannot be written to; give another output directory with -o"):
        htcompress.save(compressed, tmp_path / "a" / "out")
    assert listing(tmp_path) == {}


def test_parents_are_made_and_an_empty_folder_is_used(tmp_path: Path, compressed: Compressed) -> None:
    for place in (tmp_path / "a" / "b" / "out", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        htcompress.save(compressed, place)
        assert {path.name for path in place.iterdir()} == FILES
        assert len(list(place.parent.iterdir())) == len({"a", "empty"} if place.parent == tmp_path else {"out"})


def test_a_place_relative_to_the_present_folder(
    tmp_path: Path, compressed: Compressed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    htcompress.save(compressed, "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_an_older_directory_is_replaced_and_its_owners_files_stay(written: Path) -> None:
    (written / "notes").mkdir()
    (written / "notes" / "a.txt").write_text("mine")
    (written / "report.html").write_text("an earlier version's")
    other = htcompress.compress(tagger(seed=1), budget=300, layout="svd")
    htcompress.save(other, written)
    assert equal(read_tensors(written), other.tensors)
    assert read_report(written) == other.report
    assert {path.name for path in written.iterdir()} == FILES | {"notes", "report.html"}
    assert (written / "notes" / "a.txt").read_text() == "mine"
    assert [path.name for path in written.parent.iterdir()] == ["out"]


def test_through_a_symbolic_link(tmp_path: Path, written: Path) -> None:
    (tmp_path / "link").symlink_to(written)
    other = htcompress.compress(tagger(seed=1), budget=300, layout="svd")
    htcompress.save(other, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert equal(read_tensors(written), other.tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def failing(original: Callable[..., Any], error: BaseException, at: int) -> Callable[..., Any]:
    """A function that raises an error at its n-th call, and is the original otherwise."""
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    return call


AGAIN = "Convert the model again"
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "error", "at"),
    [
        (safetensors.torch, "save_file", FULL, 1),
        (safetensors.torch, "save_file", SafetensorError("No space left"), 1),
        (writing, "to_markdown", MemoryError(), 1),
        (writing, "model_card", KeyboardInterrupt(), 1),
        *((Path, "write_text", FULL, at) for at in (1, 2, 4)),
        *((Path, "rename", FULL, at) for at in (1, 2)),
        (writing, "_linked", FULL, 1),
    ],
)
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path,
    compressed: Compressed,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: BaseException,
    at: int,
    replacing: bool,
) -> None:
    place = tmp_path / "a" / "b" / "out"
    if replacing:
        htcompress.save(compressed, place)
        (place / "mine.txt").write_text("mine")
        (place / "also mine").mkdir()
    elif name == "_linked":
        pytest.skip("there is nothing of others in a fresh directory")
    elif name == "rename" and at > 1:
        pytest.skip("a fresh directory is renamed once")
    if name == "rename":
        # As on a system that cannot exchange two directories.
        monkeypatch.setattr(writing, "_swapped", lambda a, b: False)
    before = listing(tmp_path)
    other = htcompress.compress(tagger(seed=1), budget=300, layout="svd")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), error, at))
        expected = RequestError if isinstance(error, OSError | SafetensorError) else type(error)
        with pytest.raises(expected) as caught:
            htcompress.save(other, place)
    if expected is RequestError:
        assert "No space left" in str(caught.value)
        assert str(place) in str(caught.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_signal_waits_until_the_directory_stands(
    tmp_path: Path, compressed: Compressed, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, replacing: bool
) -> None:
    if replacing:
        htcompress.save(compressed, tmp_path / "out")
    arrived: list[int] = []
    before = signal.signal(number, lambda *given: arrived.append(given[0]))
    original = writing.to_markdown

    def interrupted(report: htcompress.Report) -> str:
        signal.raise_signal(number)
        assert arrived == []
        return original(report)

    monkeypatch.setattr(writing, "to_markdown", interrupted)
    other = htcompress.compress(tagger(seed=1), budget=300, layout="svd")
    try:
        htcompress.save(other, tmp_path / "out")
        assert arrived == [number]
        assert signal.getsignal(number) is not before
    finally:
        signal.signal(number, before)
    assert equal(read_tensors(tmp_path / "out"), other.tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_written_from_a_thread(tmp_path: Path, compressed: Compressed) -> None:
    thread = threading.Thread(target=htcompress.save, args=(compressed, tmp_path / "out"))
    thread.start()
    thread.join()
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("computed", [parametrizations.orthogonal, parametrizations.weight_norm])
def test_what_is_computed_of_others_and_stayed_dense_is_loaded(
    computed: Callable[[nn.Module, str], nn.Module], tmp_path: Path
) -> None:
    """Made without the class, a directory holds the parts; the instance's layer goes on being computed of them."""

    def made(seed: int) -> nn.ModuleDict:
        torch.manual_seed(seed)
        return nn.ModuleDict({"first": nn.LSTM(24, 8), "second": computed(nn.RNN(8, 8), "weight_hh_l0")})

    trained = made(0)
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    goal = Goal(budget=700)
    htcompress.save(htcompress.convert(tmp_path / "model.pt", goal=goal), tmp_path / "out")
    loaded = htcompress.load(tmp_path / "out", made(1))
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        assert torch.equal(loaded["second"](x)[0], trained["second"](x)[0])
    assert any("parametrizations" in name for name in loaded.state_dict())

"""Files made to do harm: refused in little time and memory, with a message, and nothing of them is ever run."""

from __future__ import annotations

import importlib
import io
import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Claim, archive, bounded, refused, written
from safetensors.torch import save_file
from small import equal, tagger
from torch import Tensor

from htcompress.checks.config import read_targets
from htcompress.errors import CheckpointError, RequestError
from htcompress.model.inventory import inventory
from htcompress.sources import nesting, pickled
from htcompress.sources.read import read_checkpoint


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    with bounded():
        yield


TENSORS: dict[str, tuple[Claim, str]] = {
    "a storage that is not all there": (Claim(1000, 0, (4,), (1,)), "needs 4000 bytes of storage '0'; the file has 64"),
    "a storage of terabytes": (Claim(1 << 40, 0, (4,), (1,)), "the file has 64"),
    "a storage past all measure": (Claim(10**30, 0, (4,), (1,)), "the file has 64"),
    "a negative storage": (Claim(-4, 0, (4,), (1,)), "the file has 64"),
    "an offset behind it": (Claim(16, 15, (4,), (1,)), "reaches to number 19 of a storage of 16"),
    "a negative offset": (Claim(16, -1, (4,), (1,)), "a shape that no tensor has"),
    "a shape behind it": (Claim(16, 0, (5, 4), (4, 1)), "reaches to number 20"),
    "strides behind it": (Claim(16, 0, (4, 4), (100, 1)), "reaches to number 304"),
    "negative strides": (Claim(16, 15, (4,), (-1,)), "a shape that no tensor has"),
    "a negative size": (Claim(16, 0, (-4,), (1,)), "a shape that no tensor has"),
    "sizes past all measure": (Claim(16, 0, (10**30,), (0,)), "a shape that no tensor has"),
    "a product past all measure": (Claim(16, 0, (1 << 40, 1 << 40), (0, 0)), "more numbers than any file holds"),
    "one number, terabytes of times": (Claim(16, 0, (1 << 40,), (0,)), "they repeat numbers (expand) beyond measure"),
    "one number, often": (Claim(16, 0, (1 << 24,), (0,)), "they repeat numbers"),
    "no shape": (Claim(16, 0, 4, 1), "has no shape"),
    "a shape of texts": (Claim(16, 0, ("4",), (1,)), "a shape that no tensor has"),
    "a shape and no strides": (Claim(16, 0, (4,), ()), "has no shape"),
    "a hundred dimensions": (Claim(16, 0, (1,) * 100, (1,) * 100), "a shape that no tensor has"),
    "truth for a size": (Claim(16, 0, (True,), (1,)), "a shape that no tensor has"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_lie(tmp_path: Path, case: str) -> None:
    claim, words = TENSORS[case]
    path = archive(tmp_path / "m.pt", written({"rnn.weight_hh_l0": claim}), {"0": bytes(64)})
    message = refused(path)
    assert "rnn.weight_hh_l0" in message
    assert words in message


def test_a_tensor_that_does_not_lie(tmp_path: Path) -> None:
    numbers = torch.arange(16.0)
    state = {
        "a": Claim(16, 3, (2, 3), (4, 1)),
        "b": Claim(16, 16, (0, 1 << 30), (1, 1)),
        "c": Claim(16, 15, (9,), (0,)),
    }
    path = archive(tmp_path / "m.pt", written(state), {"0": numbers.numpy().tobytes()})
    read = read_checkpoint(path).tensors
    assert torch.equal(read["a"], numbers.as_strided((2, 3), (4, 1), 3))
    assert read["b"].shape == (0, 1 << 30)
    assert torch.equal(read["c"], torch.full((9,), 15.0))


def test_many_views_of_one_storage_are_bounded(tmp_path: Path) -> None:
    # Each is small; all together they would be gigabytes once they are written out.
    state = {f"{k}": Claim(1 << 18, k, ((1 << 18) - k,), (1,)) for k in range(2000)}
    path = archive(tmp_path / "m.pt", written(state), {"0": bytes(1 << 20)})
    assert "beyond measure" in refused(path)


def test_one_tensor_under_many_names_is_no_harm(tmp_path: Path) -> None:
    claim = Claim(1 << 16, 0, (1 << 16,), (1,))
    one = written({f"layers.{k}.w": claim for k in range(500)})
    path = archive(tmp_path / "m.pt", one, {"0": bytes(1 << 18)})
    # The pickle above names it anew each time; torch refers back, and so does this.
    shared = torch.zeros(1 << 16)
    torch.save({f"layers.{k}.w": shared for k in range(500)}, tmp_path / "tied.pt")
    assert len(read_checkpoint(tmp_path / "tied.pt").tensors) == 500
    assert "beyond measure" in refused(path)


def test_a_mapping_in_itself(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.zeros(2)}
    state["again"] = state
    torch.save(state, tmp_path / "m.pt")
    assert "deep" in refused(tmp_path / "m.pt")


def test_a_mapping_doubled_again_and_again(tmp_path: Path) -> None:
    for times in (14, 30, 300):
        made: list[Any] = [{"w": torch.zeros(2)}]
        for _ in range(times):
            made.append({"a": made[-1], "b": made[-1]})
        file = io.BytesIO()
        sys.setrecursionlimit(10_000)
        try:
            torch.save(made[-1], file)
        finally:
            sys.setrecursionlimit(1000)
        (tmp_path / "m.pt").write_bytes(file.getvalue())
        try:
            assert len(read_checkpoint(tmp_path / "m.pt").tensors) == 1 << times
        except CheckpointError:
            assert times > 14


def test_wide_mappings_that_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nesting, "MOST_NAMES", 10_000)
    inner: Any = {f"w{k}": torch.zeros(1) for k in range(50)}
    for _ in range(4):
        inner = {f"p{k}": inner for k in range(50)}
    torch.save(inner, tmp_path / "m.pt")
    assert "more than 10000 names" in refused(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="more than 10000 mappings"):
        read_checkpoint(tmp_path / "m.pt", weights="none")


def test_a_hundred_thousand_names(tmp_path: Path) -> None:
    one = torch.zeros(1)
    torch.save({f"some.module.{k}.weight": one for k in range(100_000)}, tmp_path / "m.pt")
    read = read_checkpoint(tmp_path / "m.pt")
    assert len(read.tensors) == 100_000
    with pytest.raises(CheckpointError, match="no recurrent layers"):
        inventory(read.tensors)


NAMES: list[Any] = ["", "a\nb", "a\x00b", "a\x1b[31mb", "\u202eb", "x" * 2000, b"bytes", (1, "a"), None, 2.5, 1 << 70]


def test_names_of_all_kinds(tmp_path: Path) -> None:
    read: list[str] = []
    told: list[str] = []
    for name in NAMES:
        torch.save({name: torch.ones(1)}, tmp_path / "m.pt")
        try:
            read += read_checkpoint(tmp_path / "m.pt").tensors
        except CheckpointError as error:
            told.append(str(error))
    assert read == ["", "b'bytes'", "(1, 'a')", "None", "2.5", str(1 << 70)]
    assert len(told) == 5
    assert all(message.isprintable() and "expected names of at most 1024 printable" in message for message in told)


def test_names_that_become_one(tmp_path: Path) -> None:
    torch.save({1: torch.ones(1), "1": torch.zeros(1)}, tmp_path / "m.pt")
    assert "two entries that are called '1'" in refused(tmp_path / "m.pt")


def test_paths_in_names_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.pt"
    archive(path, written({"../../out": Claim(4, 0, (4,), (1,))}), {"0": bytes(16), "../../../out": b"x"})
    assert list(read_checkpoint(path).tensors) == ["../../out"]
    state = {"../out": torch.ones(1)}
    save_file(state, tmp_path / "in" / "m.safetensors")
    assert equal(read_checkpoint(tmp_path / "in" / "m.safetensors").tensors, state)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "m.pt", "m.safetensors"]


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("m/data.pkl", "m/data/0"):
        path = tmp_path / "m.pt"
        with zipfile.ZipFile(path, "w") as made:
            if name != "m/data.pkl":
                made.writestr("m/data.pkl", written({"w": Claim(50 << 20, 0, (50 << 20,), (1,))}))
            bomb = zipfile.ZipInfo(name)
            bomb.compress_type = zipfile.ZIP_DEFLATED
            with made.open(bomb, "w") as file:
                for _ in range(200):
                    file.write(b"]" * (1 << 20))
        assert path.stat().st_size < 1 << 20
        assert "compressed entries" in refused(path)
    monkeypatch.setattr(pickled, "MOST_PICKLED", 1000)
    assert "expected at most 1000" in refused(archive(tmp_path / "o.pt", b"\x80\x02" + b"]" * 2000))


def headed(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS: dict[str, bytes] = {
    "a header of exabytes": headed({}, length=1 << 60),
    "a header longer than the file": headed({}, length=10_000),
    "no header": struct.pack("<Q", 0) + b"{}",
    "offsets behind the file": headed({"a": entry([1 << 20], [0, 4 << 20])}),
    "offsets past all measure": headed({"a": entry([4], [0, 10**30])}),
    "negative offsets": headed({"a": entry([4], [-16, 0])}),
    "offsets turned round": headed({"a": entry([4], [16, 0])}),
    "a shape of terabytes": headed({"a": entry([1 << 40], [0, 64])}),
    "a shape past all measure": headed({"a": entry([1 << 62, 1 << 62], [0, 64])}),
    "a negative shape": headed({"a": entry([-4, -4], [0, 64])}),
    "one place for two": headed({"a": entry([16], [0, 64]), "b": entry([16], [0, 64])}),
    "a hole": headed({"a": entry([4], [0, 16]), "b": entry([4], [48, 64])}),
    "an unknown type": headed({"a": entry([16], [0, 64], "F31")}),
    "a list": headed([1, 2]),
    "numbers for texts": headed({"__metadata__": {"a": 1}, "b": entry([16], [0, 64])}),
    "nested past all measure": headed(b'{"a":' * 100_000),
    "a name twice": headed(b'{"a":' + json.dumps(entry([16], [0, 64])).encode() + b',"a":1}'),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(SAFETENSORS[case])
    refused(path)
    path.rename(tmp_path / "m.pt")
    refused(tmp_path / "m.pt")


def test_tensors_of_no_size_and_any_shape(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(headed({"a": entry([0, 1 << 62], [0, 0]), "b": entry([16], [0, 64])}))
    try:
        read = read_checkpoint(path).tensors
    except CheckpointError:
        return
    assert read["a"].numel() == 0


def test_aliases_without_end(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    names = {f"alias{k}": "a" for k in range(50_000)} | {"x": "y", "y": "x", "z": "z"}
    path.write_bytes(headed({"__metadata__": names, "a": entry([16], [0, 64])}))
    read = read_checkpoint(path).tensors
    assert len(read) == 50_001
    assert len({tensor.data_ptr() for tensor in read.values()}) == 1


ODD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (Tensor.to_sparse, "is a sparse tensor; expected a dense one"),
    "of the meta device": (lambda t: t.to("meta"), "a tensor without numbers"),
    "conjugated": (lambda t: t.to(torch.complex64).conj(), "a view that torch has not evaluated"),
}


@pytest.mark.parametrize("case", ODD)
def test_tensors_that_are_none(tmp_path: Path, case: str) -> None:
    change, words = ODD[case]
    state = dict(tagger().state_dict())
    state["head.weight"] = change(state["head.weight"])
    torch.save(state, tmp_path / "m.pt")
    message = refused(tmp_path / "m.pt")
    assert "head.weight" in message
    assert words in message


def test_extra_state_of_all_shapes(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    wide: Any = [1] * 100
    for _ in range(6):
        wide = [wide] * 100
    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (deep, wide, cycle, torch.device("cpu"), {"a": {1, 2}, "b": (b"x", None, 1.5)}):
        torch.save({"a._extra_state": value, "w": torch.ones(1)}, tmp_path / "m.pt")
        if isinstance(value, dict):
            assert read_checkpoint(tmp_path / "m.pt").extra == {"a._extra_state": value}
        else:
            assert "a._extra_state" in refused(tmp_path / "m.pt")


def test_a_device_is_no_file() -> None:
    with pytest.raises(CheckpointError, match="a device or a pipe"):
        read_checkpoint("/dev/zero")


CONFIGURATIONS = {
    "a number of thousands of digits": "max_parameters = " + "9" * 5000,
    "a number past all measure": f"max_parameters = {2**80}",
    "infinity": "max_drop = inf",
    "not a number": "min_metric = nan",
    "nested past all measure": "max_drop = " + "[" * 5000,
    "a date": "max_parameters = 1979-05-27",
    "a path of nothing": 'max_parameters = 5\nreport = "a\\u0000b"',
    "a long text": f'max_parameters = "{"9" * 5000}"',
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations_of_all_shapes(tmp_path: Path, case: str) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(f"[tool.htcompress.check]\n{CONFIGURATIONS[case]}\n")
    with pytest.raises(RequestError) as caught:
        read_targets(config=path)
    assert len(str(caught.value)) < 500


def test_what_a_fuzzer_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The whole run is benchmarks/robustness/fuzz.py; its last figures are in benchmarks/results/fuzz.txt.
    folder = Path(__file__).parents[2] / "benchmarks" / "robustness"
    monkeypatch.syspath_prepend(str(folder))
    fuzz = importlib.import_module("fuzz")
    readers = {name: r for name, r in fuzz.READERS.items() if r.read is fuzz.READERS["torch archive"].read}
    readers |= {"pyproject.toml": fuzz.READERS["pyproject.toml"]}
    monkeypatch.setattr(fuzz, "READERS", readers)
    tallies, faults = fuzz.fuzz(400, int(os.environ.get("FUZZ_SEED", "0")), tmp_path)
    assert faults == []
    assert sum(tally.outcomes.total() for tally in tallies.values()) == 400
    for name, tally in tallies.items():
        assert tally.outcomes["refused"] > 0, name

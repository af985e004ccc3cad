"""Layers in C: compiled without a warning, equal to torch, without a fault that sanitizers see."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from crossing import crossed, some
from small import Outcome
from torch import nn

import htcompress
from htcompress.vocabulary import Format

Command = Callable[..., Outcome]

STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")

KINDS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


def compiled(folder: Path, *flags: str) -> str:
    """What the test of a folder prints, once it was compiled and has ended with 0."""
    program = folder / "test"
    made = subprocess.run(
        ["gcc", *STRICT, *flags, "rnn.c", "test.c", "-lm", "-o", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def exported(module: nn.Module, place: Path, **how: Any) -> Path:
    x = torch.randn(6, 3, module.input_size, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    htcompress.save(htcompress.compress(module, calibration=[x], **how), place / "out")
    done = htcompress.export(place / "out", place / "c", to="c", nonlinearity=getattr(module, "nonlinearity", None))
    assert {file.name for file in done.files} == {"rnn.h", "rnn.c", "test.c"}
    return place / "c"


FORMS = [{"layout": layout} for layout in ("split", "paired", "svd")]
FORMS += [{"format": form} for form in (Format.TT, Format.TR, Format.BT)]

CASES = random.Random(0).sample(
    [
        (kind, {"bidirectional": both, "num_layers": layers, "bias": bias}, {"scope": scope, **form, "bits": bits})
        for kind, both, layers, bias, scope, form, bits in product(
            KINDS, (False, True), (1, 2), (True, False), ("integrated", "separate", "input"), FORMS, (32, 16, 5)
        )
    ],
    120,
)


@needs_gcc
@pytest.mark.parametrize(("kind", "options", "how"), crossed(CASES, 1))
def test_equal_to_torch(kind: str, options: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = KINDS[kind](24, 16, **options)
    compiled(exported(module, tmp_path, ratio=1.4, **how), *SANITIZED)


@needs_gcc
@pytest.mark.parametrize("bits", some([8, 7, 6, 4, 3, 2], 3))
def test_rounded_dense_matrices(bits: int, tmp_path: Path) -> None:
    compiled(exported(nn.GRU(17, 9, batch_first=True), tmp_path, ratio=1, format="dense", bits=bits), "-O2")


@needs_gcc
@pytest.mark.parametrize("how", [{"layout": "paired", "scope": "input"}, {"scope": "integrated", "bits": 5}])
def test_inputs_in_unlike_units(how: dict[str, Any], tmp_path: Path) -> None:
    module, units = nn.GRU(24, 16, bidirectional=True), 10.0 ** torch.linspace(-3, 3, 24)
    with torch.no_grad():
        module.weight_ih_l0 /= units
        module.weight_ih_l0_reverse /= units
    seen = units * torch.randn(40, 3, 24, generator=torch.Generator().manual_seed(1))
    htcompress.save(htcompress.compress(module, calibration=[seen], ratio=2, **how), tmp_path / "out")
    htcompress.export(tmp_path / "out", tmp_path / "c", to="c")
    assert "exponents" in (tmp_path / "c" / "rnn.c").read_text().partition("direction_t")[0]
    compiled(tmp_path / "c", *SANITIZED)


@pytest.mark.full
@needs_gcc
def test_every_output_counts(tmp_path: Path) -> None:
    """The program that tests fails where a number is another."""
    folder = exported(nn.LSTM(24, 16), tmp_path, ratio=4)
    text = (folder / "test.c").read_text()
    start = text.index("wanted[STEPS")
    first = text.index("{", start) + 1
    end = text.index(",", first)
    (folder / "test.c").write_text(text[:first] + f"{float(text[first:end]) + 1e-3}" + text[end:])
    subprocess.run(["gcc", *STRICT, "rnn.c", "test.c", "-lm", "-o", "t"], cwd=folder, check=True)
    assert subprocess.run([folder / "t"], capture_output=True, check=False).returncode == 1


@needs_gcc
def test_a_step_is_what_a_sequence_is(tmp_path: Path) -> None:
    folder = exported(nn.LSTM(24, 16, num_layers=2), tmp_path, ratio=4)
    text = (folder / "test.c").read_text()
    whole = "rnn_sequence(x, STEPS, h, c, out, work);"
    steps = "for (int t = 0; t < STEPS; t++) rnn_step(x + t * RNN_INPUTS, h, c, out + t * RNN_OUTPUTS, work);"
    assert whole in text
    (folder / "test.c").write_text(text.replace(whole, steps))
    compiled(folder, *SANITIZED)


@pytest.mark.full
@needs_gcc
def test_several_layers_by_name(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"first": nn.LSTM(12, 8), "second": nn.GRU(8, 8)})
    torch.save(model.state_dict(), "model.pt")
    assert htc("convert", "model.pt", "--ratio", "2", "-o", "out").code == 0
    ended = htc("export", "out", "c", "--to", "c")
    assert ended.code == 0, ended.err
    assert "second: constants" in " ".join(ended.out.split())
    for name in ("first", "second"):
        compiled(tmp_path / "c" / name)


def test_what_is_not_written(htc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module, said in ((nn.LSTM(12, 8, proj_size=3), "has a projection"), (nn.GRUCell(12, 8), "it is a cell")):
        htcompress.save(htcompress.compress(module, ratio=2), "out")
        ended = htc("export", "out", "c", "--to", "c")
        assert ended.code == 2
        assert said in ended.err
        shutil.rmtree("out")
    htcompress.save(htcompress.compress(nn.LSTM(12, 8), ratio=2), "out")
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (("out", "file", "--to", "c"), "is a file; --to c writes a folder"),
        (("out", "c", "--to", "c", "--lengths"), "--lengths is an input of recurrent layers alone"),
        (("out", "c", "--to", "c", "--task", "task.py"), "leave out --task"),
    ):
        ended = htc("export", *arguments)
        assert ended.code == 2
        assert said in ended.err, ended.err
    assert not (tmp_path / "c").exists()

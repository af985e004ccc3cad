"""The properties of the house that a test can hold: floors, file lengths, registries, promises that are raised."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from htcompress.forms import FORMS
from htcompress.nn.recurrence import RECURRENCES, TORCH_CLASSES, recurrence_of
from htcompress.nn.recurrent import FAMILY
from htcompress.vocabulary import Format, Kind

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("htcompress/**/*.py"), *ROOT.glob("cli/**/*.py")])
LONGEST = 400
FORM_CLASSES = ("HTMatrix", "NetworkMatrix", "DenseMatrix", "TensorTrain", "TensorRing", "BlockTerm")


def test_imports_go_down_only() -> None:
    """The floors stand in pyproject.toml, every module has one."""
    pytest.importorskip("importlinter")
    program = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short_and_promises_are_raised(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    tree = ast.parse(text)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], "an assertion"
    assert ast.get_docstring(tree) or not text.strip(), "no docstring"


def test_forms_and_kinds_are_asked_for_where_they_are_defined() -> None:
    """Nobody else looks which class a stored matrix is of, or which kind a layer."""
    ladder = re.compile(rf"isinstance\([^()]*\b({'|'.join(FORM_CLASSES)})\b")
    kinds = re.compile(r"\bkind (is|==|!=|is not)\s*\(?\s*Kind\b")
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if file.parent.name != "forms":
            assert not ladder.search(text), file
        if file.name != "recurrence.py":
            assert not kinds.search(text), file


def test_registries_are_complete() -> None:
    names = [form.name for form in FORMS]
    assert len(set(names)) == len(names)
    assert {form.name for form in FORMS if form.search is not None} == {form.value for form in Format}
    for form in FORMS:
        assert form.search is not None or form.zeros is not None
    assert [recurrence.kind for recurrence in RECURRENCES] == list(Kind)
    assert set(TORCH_CLASSES) == {nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
    for kind in Kind:
        recurrence = recurrence_of(kind)
        classes = [cls for cls in FAMILY if kind in cls.kinds]
        assert len(classes) == 2
        assert all(issubclass(cls, (recurrence.torch_layer, recurrence.torch_cell)) for cls in classes)
        assert sorted(recurrence.onnx.gate_order) == list(range(recurrence.gates))

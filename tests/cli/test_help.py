"""Help is there for every command, and costs no heavy import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from htcompress_cli.commands import app
from rich.cells import cell_len
from sample_report import sample_report
from small import Outcome

import htcompress

Command = Callable[..., Outcome]

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = ("torch", "numpy", "scipy", "tensorly", "safetensors", "jaxtyping")

LIGHT = """
import contextlib, io, json, sys
from htcompress_cli.main import run
asked, names, found = *map(json.loads, sys.argv[1:]), {}
for arguments in asked:
    sys.argv = ["htcompress", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run()
        except SystemExit as end:
            code = end.code
    heavy = [name for name in names if name in sys.modules]
    found[" ".join(arguments)] = [code, heavy, len(shown.getvalue()), len(errors.getvalue())]
print(json.dumps(found))
"""


def python(program: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return ended.stdout


def test_help_imports_nothing_heavy() -> None:
    asked = [["--help"], ["-h"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    found = json.loads(python(LIGHT, json.dumps(asked), json.dumps(HEAVY)))
    assert len(found) == len(asked)
    for arguments, (code, heavy, out, err) in found.items():
        assert (code, heavy, err) == (0, [], 0), arguments
        assert out > 0


def test_check_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(sample_report().to_json())
    asked = [["check", str(tmp_path), "--max-parameters", "1m", "--junit", str(tmp_path / "found.xml")]]
    names = [*HEAVY, "jinja2", "matplotlib"]
    ((code, heavy, _, err),) = json.loads(python(LIGHT, json.dumps(asked), json.dumps(names))).values()
    assert (code, heavy, err) == (0, [], 0)


def test_the_library_is_imported_without_torch() -> None:
    program = "import sys, htcompress, htcompress.errors; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert python(program) == "[]\n"


def test_every_public_name_is_there() -> None:
    assert sorted(htcompress.__all__) == dir(htcompress)
    for name in htcompress.__all__:
        assert getattr(htcompress, name).__name__ == name
        assert getattr(htcompress, name).__module__.startswith("htcompress.")
    with pytest.raises(AttributeError, match="has no attribute 'decompress'"):
        htcompress.decompress  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(htc: Command, command: str) -> None:
    ended = htc(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"Usage: htcompress {command}" in ended.out
    assert max(map(cell_len, ended.out.splitlines())) <= 80
    assert ended == htc(command, "-h")
    assert command in htc("--help").out


@pytest.mark.parametrize(
    "option",
    [
        *("--budget", "--error", "--ratio", "--task", "--output", "-o", "--scope", "--layout", "--layers"),
        *("--no-finetune", "--steps", "--seed", "--device", "--json", "--quiet", "--debug"),
    ],
)
def test_convert_has_the_options_of_the_contract(htc: Command, option: str) -> None:
    assert f" {option} " in htc("convert", "--help").out


@pytest.mark.parametrize("command", ["inspect", "convert", "finetune", "evaluate"])
def test_the_commands_of_the_contract(command: str) -> None:
    assert command in COMMANDS

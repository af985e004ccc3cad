"""The GitHub Action: its steps are run as the runner runs them, with the installed htcompress."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sample_report import sample_report
from small import save_tagger, write_task

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}


def run(step: str, folder: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """One step with the given inputs, the others at their defaults; its outputs."""
    values = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()} | inputs
    env = {
        name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: values[found[1]], text)
        for name, text in STEPS[step]["env"].items()
    }
    output = folder / "github_output"
    output.write_text("")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[step]["run"]],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder), "GITHUB_OUTPUT": str(output), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return ended, dict(line.split("=", 1) for line in output.read_text().splitlines())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "a folder"
    out.mkdir()
    (out / "report.json").write_text(sample_report().to_json())
    (out / "report.md").write_text("# report\n")
    return tmp_path


def test_inputs_reach_scripts_by_the_environment_only() -> None:
    for step in STEPS.values():
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"
    used = set(re.findall(r"inputs\.(\w+)", (ROOT / "action.yml").read_text(encoding="utf-8")))
    assert used == set(ACTION["inputs"])


def test_limits_hold(folder: Path) -> None:
    limits = "max_parameters: 16k\n\n  max_drop = 0.01\nmax-bytes: 100k"
    ended, outputs = run("Check", folder, report="a folder", limits=limits, junit="found.xml")
    assert ended.returncode == 0, ended.stderr
    assert "3 of 3 hold" in ended.stdout
    assert outputs == {"result": "passed", "markdown": "a folder/report.md"}
    assert (folder / "found.xml").is_file()


@pytest.mark.parametrize(
    ("inputs", "code", "result"),
    [
        ({"limits": "max_parameters: 4k"}, 1, "failed"),
        ({"limits": "max_parameters: 5%"}, 2, "error"),
        ({"limits": ""}, 2, "error"),
        ({"limits": "max_drop: $(touch owned)"}, 2, "error"),
    ],
)
def test_limits_fail(folder: Path, inputs: dict[str, str], code: int, result: str) -> None:
    ended, outputs = run("Check", folder, report="a folder", **inputs)
    assert ended.returncode == code, ended.stderr
    assert outputs["result"] == result
    assert not (folder / "owned").exists()


def test_targets_of_a_configuration(folder: Path) -> None:
    table = "[tool.htcompress.check.{}]\nreport = 'a folder'\nmax_parameters = {}\n"
    (folder / "limits.toml").write_text(table.format("small", 4000) + table.format("large", 16_000))
    assert run("Check", folder, config="limits.toml")[0].returncode == 1
    assert run("Check", folder, config="limits.toml", target="large\n")[0].returncode == 0
    assert run("Check", folder, config="limits.toml", target="large\nsmall")[0].returncode == 1


def test_convert_then_check(folder: Path) -> None:
    save_tagger(folder / "model.pt")
    write_task(folder / "task.py")
    inputs = {"checkpoint": "model.pt", "task": "task.py", "budget": "400", "options": "--steps 5\n--layout svd"}
    ended, _ = run("Convert", folder, **inputs)
    assert ended.returncode == 0, ended.stderr
    ended, outputs = run("Check", folder, **inputs, limits="max_parameters: 400\nmin_metric: 0")
    assert ended.returncode == 0, ended.stderr
    assert outputs == {"result": "passed", "markdown": "model-ht/report.md"}

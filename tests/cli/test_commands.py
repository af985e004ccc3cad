"""What the commands print and write when all goes well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crossing import some
from rich.cells import cell_len
from schema import check_report
from small import Outcome, Tagger, listing, save_tagger, write_task

import htcompress
from htcompress.report import Report, read_report

Command = Callable[..., Outcome]

CONVERT = ("convert", "model.pt", "--budget", "400", "--layout", "svd")
STAGES = [
    "reading the checkpoint",
    "evaluating the dense model",
    "trying stand-ins",
    "calibrating",
    "decomposing",
    "evaluating the decomposed model",
    "fine-tuning",
    "evaluating the finetuned model",
    "measuring latency",
    "writing",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tagger(tmp_path / "model.pt")
    write_task(tmp_path / "task.py")
    return tmp_path


def test_convert_without_a_task(htc: Command, folder: Path) -> None:
    ended = htc(*CONVERT, "-o", "out")
    assert ended.code == 0
    assert "model.pt" in ended.out
    assert "Accuracy was not looked at" in ended.out
    assert ended.out.endswith(" written to out  (report.html, report.json, model.safetensors)\n")
    assert max(map(cell_len, ended.out.splitlines())) <= 80
    assert ended.err.splitlines() == ["reading the checkpoint ...", "decomposing ...", "writing ..."]
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "out", "task.py"]
    back = htcompress.load(folder / "out", Tagger())
    assert back(torch.zeros(1, 2, 24)).shape == (1, 3)


@pytest.mark.parametrize("form", some(["tt", "tr", "bt"], "tt"))
def test_convert_to_another_format(htc: Command, folder: Path, form: str) -> None:
    ended = htc("convert", "model.pt", "--budget", "500", "--format", form, "-o", "out", "--json")
    report = Report.from_json(ended.out)
    assert report.request["format"] == form
    assert report.totals.parameters_after <= 500
    layouts = {matrix.layout for layer in report.layers for matrix in layer.matrices if not matrix.kept_dense}
    assert layouts == {form}
    back = htcompress.load(folder / "out", Tagger())
    assert sum(p.numel() for p in back.rnn.parameters()) == report.totals.parameters_after


def test_convert_with_a_task(htc: Command, folder: Path) -> None:
    ended = htc(*CONVERT, "--task", "task.py", "--steps", "10", "-o", "out")
    assert ended.code == 0
    assert "accuracy" in ended.out
    assert "before fine-tuning" in ended.out
    assert ended.err.splitlines() == [f"{stage} ..." for stage in STAGES]
    quality = read_report(folder / "out").quality
    assert quality.finetuned is not None
    evaluated = htc("evaluate", "out", "--task", "task.py")
    assert (evaluated.code, evaluated.out) == (0, f"accuracy  {quality.finetuned:.6g}\nclasses  3\n")
    assert evaluated.err == "evaluating ...\n"


@pytest.mark.parametrize("options", [("--no-finetune",), ("--steps", "0")])
def test_convert_without_fine_tuning(htc: Command, folder: Path, options: tuple[str, ...]) -> None:
    ended = htc(*CONVERT, "--task", "task.py", *options, "-o", "out")
    assert ended.code == 0
    assert "fine-tuning" not in ended.err
    assert read_report(folder / "out").quality.finetuned is None


def test_the_output_is_named_after_the_checkpoint(htc: Command, folder: Path) -> None:
    (folder / "model.pt").rename(folder / "tagger.v2.pt")
    assert htc("convert", "tagger.v2.pt", "--ratio", "3", "--layout", "svd").code == 0
    assert (folder / "tagger.v2-ht" / "model.safetensors").is_file()


def test_json_is_one_document_of_the_contract(htc: Command, folder: Path) -> None:
    for options in ((), ("--task", "task.py", "--steps", "5")):
        ended = htc(*CONVERT, "-o", "out", "--json", *options)
        assert ended.code == 0
        data = json.loads(ended.out)
        check_report(data)
        assert data["request"]["budget"] == 400
        assert data["request"]["layout"] == "svd"
        assert data["request"]["task"] == ("task.py" if options else None)
        assert (data["quality"]["dense"] is None) == (not options)
        # The directory's own report finds the checkpoint from where it lies.
        shown, kept = Report.from_json(ended.out), read_report(folder / "out")
        assert (shown.source["path"], kept.source["path"]) == ("model.pt", os.path.join("..", "model.pt"))
        assert replace(kept, source=shown.source) == shown


@pytest.mark.parametrize("json_too", [False, True])
def test_quiet_says_nothing_on_stderr(htc: Command, folder: Path, json_too: bool) -> None:
    save_tagger(folder / "model.pt", ema=torch.zeros(1))
    write_task(
        folder / "task.py",
        "import warnings\nold = evaluate",
        "def evaluate(model):\n    warnings.warn('old')\n    return old(model)",
    )
    options = ("--json",) if json_too else ()
    for command in ((*CONVERT, "-o", "out", "--steps", "3"), ("finetune", "out", "--steps", "3"), ("evaluate", "out")):
        ended = htc(*command, "--task", "task.py", "--quiet", *options)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out
        if json_too:
            json.loads(ended.out)


def test_what_a_task_prints_does_not_mix_with_results(htc: Command, folder: Path) -> None:
    write_task(
        folder / "task.py",
        "print('hello from the task')",
        "old = evaluate",
        "def evaluate(model):\n    print('looking')\n    return old(model)",
    )
    ended = htc(*CONVERT, "--task", "task.py", "--no-finetune", "-o", "out", "--json")
    check_report(json.loads(ended.out))
    assert "hello from the task" in ended.err
    assert ended.err.count("looking") == 2
    ended = htc("evaluate", "out", "--task", "task.py", "--json")
    assert list(json.loads(ended.out)) == ["accuracy", "classes"]


def test_one_seed_one_result(htc: Command, folder: Path) -> None:
    made = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert htc(*CONVERT, "--task", "task.py", "--steps", "5", "--seed", seed, "-o", name).code == 0
        made.append(listing(folder / name))
    assert made[0]["model.safetensors"] == made[1]["model.safetensors"]
    assert made[0]["config.json"] == made[1]["config.json"]
    assert json.loads(made[2]["report.json"])["seed"] == 4


@pytest.mark.parametrize(
    ("goal", "wanted"),
    [
        (("--budget", "0.4k"), ("budget", 400)),
        (("--budget", "0,400"), None),
        (("--budget", "1,000"), ("budget", 1000)),
        (("--budget", "0.0004m"), ("budget", 400)),
        (("--error", "0.5"), ("error", 0.5)),
        (("--ratio", "2.5"), ("ratio", 2.5)),
    ],
)
def test_goals(htc: Command, folder: Path, goal: tuple[str, ...], wanted: tuple[str, float] | None) -> None:
    ended = htc("convert", "model.pt", "--layout", "svd", "-o", "out", "--json", *goal)
    if wanted is None:
        wanted = ("budget", 400)
    assert ended.code == 0
    data = json.loads(ended.out)
    check_report(data)
    assert data["request"][wanted[0]] == wanted[1]


@pytest.mark.parametrize("scope", ["auto", "integrated", "separate", "input"])
def test_scopes(htc: Command, folder: Path, scope: str) -> None:
    ended = htc(*CONVERT, "-o", "out", "--json", "--scope", scope)
    data = json.loads(ended.out)
    check_report(data)
    assert data["request"]["scope"] == scope
    if scope != "auto":
        assert data["layers"][0]["scope"] == scope


@pytest.mark.parametrize("layout", ["auto", "split", "paired"])
def test_layouts(htc: Command, folder: Path, layout: str) -> None:
    ended = htc("convert", "model.pt", "--ratio", "3", "-o", "out", "--json", "--scope", "input", "--layout", layout)
    data = json.loads(ended.out)
    check_report(data)
    assert data["request"]["layout"] == layout
    # Order two is a split layout as well.
    allowed = {"auto": {"split", "svd"}, "split": {"split", "svd"}, "paired": {"paired"}}[layout]
    assert {m["layout"] for m in data["layers"][0]["matrices"] if not m["kept_dense"]} <= allowed


def test_only_some_layers(htc: Command, folder: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.LSTM(8, 6), "b": torch.nn.GRU(6, 6)})
    torch.save(model.state_dict(), folder / "model.pt")
    ended = htc("convert", "model.pt", "--ratio", "2", "--layout", "svd", "--layers", "b", "-o", "out", "--json")
    data = json.loads(ended.out)
    assert [layer["name"] for layer in data["layers"]] == ["b"]
    assert data["request"]["layers"] == "b"


def test_convert_again_into_the_same_directory(htc: Command, folder: Path) -> None:
    for budget in ("400", "300"):
        assert htc("convert", "model.pt", "--budget", budget, "--layout", "svd", "-o", "out").code == 0
    assert read_report(folder / "out").request["budget"] == 300
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "out", "task.py"]


def test_finetune_updates_the_directory(htc: Command, folder: Path) -> None:
    assert htc(*CONVERT, "-o", "out").code == 0
    before = read_report(folder / "out")
    ended = htc("finetune", "out", "--task", "task.py", "--steps", "20")
    assert ended.code == 0
    assert "written to out" in ended.out
    assert ended.err.splitlines()[0] == "reading the directory ..."
    after = read_report(folder / "out")
    assert after.quality.finetuned is not None
    assert after.totals == before.totals
    assert after.source == before.source
    again = htc("finetune", "out", "--task", "task.py", "--steps", "0", "--json")
    check_report(json.loads(again.out))
    assert json.loads(again.out)["quality"]["finetuned"] == after.quality.finetuned


def test_finetune_with_another_teacher(htc: Command, folder: Path) -> None:
    assert htc(*CONVERT, "-o", "out").code == 0
    (folder / "model.pt").rename(folder / "moved.pt")
    write_task(folder / "task.py", "del loss")
    ended = htc("finetune", "out", "--task", "task.py", "--steps", "3", "--teacher", "moved.pt")
    assert ended.code == 0
    assert "note:" not in ended.err


def test_evaluate_a_checkpoint(htc: Command, folder: Path) -> None:
    expected = htcompress.evaluate("model.pt", task="task.py")
    ended = htc("evaluate", "model.pt", "--task", "task.py", "--json")
    assert (ended.code, json.loads(ended.out)) == (0, expected)
    write_task(folder / "task.py", "def evaluate(model):\n    return {'loss': 0.125, 'perplexity': float('inf')}")
    assert htc("evaluate", "model.pt", "--task", "task.py").out == "loss  0.125\nperplexity  inf\n"
    assert json.loads(htc("evaluate", "model.pt", "--task", "task.py", "--json").out) == {
        "loss": 0.125,
        "perplexity": None,
    }


def test_inspect(htc: Command, folder: Path) -> None:
    before = listing(folder)
    ended = htc("inspect", "model.pt")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(" model.pt: 1 recurrent layer, 1,088 of 1,115 parameters")
    assert max(map(cell_len, ended.out.splitlines())) <= 80
    data = json.loads(htc("inspect", "model.pt", "--json", "--layers", "r*").out)
    assert data["rnn_parameters"] == 1088
    assert listing(folder) == before


def test_names_are_shown_as_they_are(htc: Command, folder: Path) -> None:
    # Square brackets and colons mean something to the library that draws the tables.
    name = "[red]model[bold] :smile:.pt"
    layer = torch.nn.LSTM(24, 8).state_dict()
    torch.save(
        {f"blocks[bold].{key}": tensor for key, tensor in layer.items()} | {"[/x]": torch.zeros(1)}, folder / name
    )
    ended = htc("inspect", name)
    assert name in ended.out
    assert "blocks[bold]" in ended.out
    ended = htc("convert", name, "--budget", "400", "--layout", "svd", "-o", "[out] :tada:")
    assert ended.code == 0
    assert "written to [out] :tada:  (" in ended.out
    assert "blocks[bold]" in ended.out
    write_task(folder / "task.py", "def evaluate(model):\n    return {'acc[/red] :cat:': 1.0}")
    ended = htc(*CONVERT, "--task", "task.py", "--no-finetune", "-o", "out")
    assert "acc[/red] :cat:" in ended.out
    save_tagger(folder / "model.pt", **{"[/x]": torch.zeros(1)})
    ended = htc("evaluate", "model.pt", "--task", "task.py")
    assert "are unknown to model(): [/x]." in ended.err


def test_progress_bars_are_for_terminals(folder: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [
        str(Path(sys.executable).with_name("htcompress")),
        *CONVERT,
        "--task",
        "task.py",
        "--steps",
        "5",
        "-o",
        "out",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            drawn += part
        assert process.stdout is not None
        out = process.stdout.read().decode()
        assert process.wait(60) == 0
    os.close(ours)
    shown = drawn.decode()
    assert "\x1b[" in shown
    for stage in STAGES:
        assert stage in shown
    assert "loss " in shown
    assert "\x1b" not in out
    assert out.endswith("model.safetensors)\n")


def test_the_version(htc: Command) -> None:
    from importlib.metadata import version

    assert htc("--version") == Outcome(0, version("htcompress") + "\n", "")

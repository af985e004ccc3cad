"""What the views of a report show, kept as golden files; every line of the terminal's fits 80 columns."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import pytest
from packaging.version import Version
from rich.cells import cell_len
from rich.console import Console, RenderableType

from htcompress.inspection import (
    Inspection,
    LayerInspection,
    MatrixInspection,
    Outlook,
    inspection_to_terminal,
)
from htcompress.report import MatrixReport, Quality, Report, model_card, to_markdown, words
from htcompress.report.terminal import to_terminal

Golden = Callable[[str, str], None]


def shown(view: RenderableType) -> str:
    """What a view prints where there is no terminal: 80 columns, no colours, no blanks at the ends of lines."""
    file = io.StringIO()
    Console(file=file, width=80, highlight=False, markup=False, emoji=False).print(view)
    lines = file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    return "\n".join(line.rstrip() for line in lines) + "\n"


def finetuned(report: Report) -> Report:
    return report


def decomposed(report: Report) -> Report:
    quality = Quality()
    for stage, value in (("dense", 0.0912), ("decomposed", 0.1254)):
        quality = quality.with_stage(stage, {"equal error rate": value}, higher_is_better=False)
    return replace(report, quality=quality)


def without_a_task(report: Report) -> Report:
    matrices = tuple(
        replace(m, error={"weights": m.error["weights"], "outputs": None}) for m in report.layers[0].matrices
    )
    layers = (replace(report.layers[0], matrices=matrices),)
    return replace(report, layers=layers, quality=Quality())


def long_names(report: Report) -> Report:
    name = "perplexity[/b] on [the whole of] the validation set, averaged over sentences and speakers"
    quality = Quality().with_stage("dense", {name: 123456.75}, higher_is_better=False)
    quality = quality.with_stage("decomposed", {name: 0.00001}, higher_is_better=False)
    deep = "recognizer.encoder.blocks[0].bidirectional_recurrent_layer.inner.module.rnn"
    modes = {"row_modes": (2,) * 10 + (1,) * 12, "col_modes": (1,) * 10 + (3,) * 12}
    first = replace(report.layers[0].matrices[0], name=f"{deep}.l12_reverse.hr", **modes)
    matrices = (first, replace(report.layers[0].matrices[1], name="a name that does not begin with that of its layer"))
    totals = replace(report.totals, parameters_after=report.totals.parameters_before * 3, bytes_after=10**12)
    file = "a_file_with_a_name_that_is_much_longer_than_the_eighty_columns_of_a_terminal_epoch=12-step=34.ckpt"
    return replace(
        report,
        quality=quality,
        source={**report.source, "file": file},
        layers=(replace(report.layers[0], name=deep, matrices=matrices),),
        totals=totals,
    )


def nothing_gained(report: Report) -> Report:
    totals = replace(
        report.totals,
        parameters_after=report.totals.parameters_before,
        bytes_after=report.totals.bytes_before,
        macs_per_step_after=report.totals.macs_per_step_before,
        model_parameters_after=report.totals.model_parameters_before,
    )
    quality = Quality()
    for stage in ("dense", "decomposed", "finetuned"):
        quality = quality.with_stage(stage, {"accuracy": 1}, higher_is_better=True)
    return replace(report, totals=totals, layers=report.layers[1:], quality=quality)


VARIANTS = (finetuned, decomposed, without_a_task, long_names, nothing_gained)


@pytest.mark.skipif(Version(version("rich")) < Version("15"), reason="earlier ones space a table's head otherwise")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_terminals_view(report: Report, variant: Callable[[Report], Report], golden: Golden) -> None:
    golden(f"terminal_{variant.__name__}.txt", shown(to_terminal(variant(report))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_view_in_markdown(report: Report, variant: Callable[[Report], Report], golden: Golden) -> None:
    golden(f"markdown_{variant.__name__}.txt", to_markdown(variant(report)))


@pytest.mark.parametrize("variant", [finetuned, without_a_task])
def test_the_model_card(report: Report, variant: Callable[[Report], Report], golden: Golden) -> None:
    golden(f"card_{variant.__name__}.txt", model_card(variant(report)))


def test_the_model_card_of_a_model_compressed_in_memory(report: Report) -> None:
    card = model_card(replace(report, source={"file": "Tagger", "sha256": None, "path": None}))
    assert "None" not in card


def test_tables_in_markdown_have_equally_many_cells(report: Report) -> None:
    for variant in VARIANTS:
        for block in to_markdown(variant(report)).split("\n\n"):
            rows = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1


def inspection() -> Inspection:
    spectrum = (1.0, 0.8, 0.5, 0.4, 0.31, 0.3, 0.25, 0.2, 0.1, 0.05, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0)

    def matrix(name: str, rows: int, cols: int) -> MatrixInspection:
        return MatrixInspection(name, (rows, cols), {"0.5": 2, "0.1": 9, "0.01": 12}, spectrum)

    settings = {
        "kind": "lstm",
        "input_size": 57600,
        "hidden_size": 256,
        "num_layers": 2,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": True,
        "proj_size": 64,
        "cell": False,
    }
    cell = {**settings, "kind": "gru", "num_layers": 1, "bidirectional": False, "proj_size": 0, "cell": True}
    deep = "recognizer.encoder.blocks[0].bidirectional_recurrent_layer.inner.module.rnn"
    return Inspection(
        file="model.pt",
        parameters=60_000_000,
        rnn_parameters=59_775_272,
        layers=(
            LayerInspection(
                "rnn", "lstm", settings, 59_000_000, (matrix("rnn.l0.ih", 1024, 57600), matrix("rnn.l0.hh", 1024, 64))
            ),
            LayerInspection("", "gru", cell, 7, (matrix("cell.ih", 3, 2),)),
            LayerInspection(deep, "rnn_relu", {**cell, "cell": False}, 7, (matrix(f"{deep}.l0_reverse.ih", 512, 512),)),
        ),
        outlook=(Outlook(29_887_636, 0.5, 0.53712), Outlook(597_752, 0.01, 0.924), Outlook(5, 0.0001, None)),
    )


def test_the_view_of_an_inspection(golden: Golden) -> None:
    golden("inspection.txt", shown(inspection_to_terminal(inspection())))


def test_what_stands_outside_of_recurrent_layers_is_told(report: Report) -> None:
    most = shown(inspection_to_terminal(replace(inspection(), parameters=60_000_000, rnn_parameters=3_600_000)))
    assert "3,600,000 of 60,000,000 parameters (6 %)" in most
    assert "94 % of the model's 60,000,000 numbers stand outside" in most
    assert words.elsewhere(31, 60) is None
    assert words.elsewhere(29, 60) is not None
    large = replace(report.totals, model_parameters_before=10 * report.totals.parameters_before)
    assert not any("stand outside" in note for note in words.notes(report))
    assert any("90 % of the model's" in note for note in words.notes(replace(report, totals=large)))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (3_753_984, "3.75 MB"),
        (10**9, "1 GB"),
        (999_600, "1 MB"),
        (10**13, "10 TB"),
    ],
)
def test_sizes(number: int, text: str) -> None:
    assert words.size(number) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (100, 100, "same"),
        (938_496, 4_987, "188.2x smaller"),
        (59_775_272, 5, "11,955,054x smaller"),
        (100, 250, "2.5x larger"),
        (1000, 999, "1.001x smaller"),
    ],
)
def test_ratios(before: int, after: int, text: str) -> None:
    assert words.ratio(before, after) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0.0000"), (0.97, "0.9700"), (123.456, "123.4560"), (0.000012, "1.2e-05")]
)
def test_metrics(value: float | None, text: str) -> None:
    assert words.metric(value) == text


def test_forms_and_ranks(report: Report) -> None:
    matrices: list[MatrixReport] = [m for layer in report.layers for m in layer.matrices]
    assert [words.form(m) for m in matrices] == ["4·16·16 | 120·161·3", "1024 | 256", "4×4 8×4 8×4 4×4", "dense"]
    assert [words.rank(m) for m in matrices] == ["12", "3", "7", ""]

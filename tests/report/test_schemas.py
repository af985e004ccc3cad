"""The published JSON Schemas: those of the types, and what is written fits them by another library's judgement."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
from packaging.version import Version
from sample_report import sample_report
from test_html import study

from htcompress import Compressed, save
from htcompress.schemas import schema
from htcompress.schemas.__main__ import generated


@pytest.mark.skipif(Version(version("msgspec")) < Version("0.22"), reason="earlier ones lay a schema out otherwise")
@pytest.mark.parametrize("file", generated())
def test_the_files_are_those_of_the_types(file: str) -> None:
    assert json.loads(generated()[file]) == schema(file.removesuffix(".schema.json")), (
        "run python -m htcompress.schemas"
    )


def test_what_is_written_fits(compressed: Compressed, tmp_path: Path) -> None:
    for report in (sample_report(), compressed.report):
        jsonschema.validate(json.loads(report.to_json()), schema("report"))
    jsonschema.validate(json.loads(study().to_json()), schema("study"))
    save(compressed, tmp_path / "out")
    jsonschema.validate(json.loads((tmp_path / "out" / "config.json").read_text()), schema("config"))


def test_what_does_not_fit_is_told() -> None:
    data = json.loads(sample_report().to_json())
    data["totals"]["parameters_after"] = -1
    with pytest.raises(jsonschema.ValidationError, match="minimum"):
        jsonschema.validate(data, schema("report"))

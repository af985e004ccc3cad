"""Writes the JSON Schemas from the types that reports, studies and configurations are read by."""

from __future__ import annotations

import json
from pathlib import Path

from htcompress.directory.config import Config
from htcompress.directory.read import FORMAT
from htcompress.report.report import SCHEMA as REPORT
from htcompress.report.report import Report
from htcompress.report.schema import schema_of
from htcompress.report.study import SCHEMA as STUDY
from htcompress.report.study import Study

TYPES = {"report": (Report, REPORT), "study": (Study, STUDY), "config": (Config, FORMAT)}


def generated() -> dict[str, str]:
    """The text of each file by its name."""
    return {
        f"{name}.schema.json": json.dumps(schema_of(cls, known), indent=1) + "\n"
        for name, (cls, known) in TYPES.items()
    }


if __name__ == "__main__":
    for file, text in generated().items():
        (Path(__file__).parent / file).write_text(text, encoding="utf-8")

"""The JSON Schemas of what the tool writes: `report.schema.json`, `study.schema.json`, `config.schema.json`.

`python -m htcompress.schemas` writes them anew from the types.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def schema(name: str) -> dict[str, Any]:
    """A published JSON Schema.

    >>> schema("report")["$id"]
    'htcompress.report/1'

    Args:
        name: `report`, `study` or `config`.

    Raises `FileNotFoundError` where there is none.
    """
    return dict(json.loads(files(__name__).joinpath(f"{name}.schema.json").read_text(encoding="utf-8")))

"""The contract's report.json (schema `htcompress.report/1`), written down once more for the tests."""

from __future__ import annotations

from types import NoneType
from typing import Any

NUMBER = (int, float)
MAYBE = (int, float, NoneType)
SHARE = ("integrated", "separate", "input", "mixed", None)

MATRIX: dict[str, Any] = {
    "name": str,
    "shape": [int],
    "layout": str,
    "row_modes": [int],
    "col_modes": [int],
    "tree": (list, int),
    "ranks": {str: int},
    "parameters": int,
    "error": {"weights": MAYBE, "outputs": MAYBE},
    "kept_dense": bool,
    "spectrum": (list, NoneType),
    "bytes": (int, NoneType),
    "codec": (dict, NoneType),
}
LAYER: dict[str, Any] = {
    "name": str,
    "kind": str,
    "settings": {str: (str, int, float, bool)},
    "parameters_before": int,
    "parameters_after": int,
    "scope": (str, NoneType),
    "matrices": [MATRIX],
    "units_reordered": bool,
}
REPORT: dict[str, Any] = {
    "schema": str,
    "version": str,
    "source": {"file": str, "sha256": (str, NoneType), "path": (str, NoneType)},
    "seed": int,
    "request": {
        "budget": (int, NoneType),
        "error": MAYBE,
        "ratio": MAYBE,
        "scope": str,
        "layout": str,
        "format": str,
        "unit_order": str,
        "bits": (int, str),
        "bytes": (int, NoneType),
        "task": (str, NoneType),
        "layers": str,
        "weights": (str, NoneType),
        "device": str,
        "names": (dict, NoneType),
        "model": (dict, NoneType),
        "data": (dict, NoneType),
        "finetuning": (dict, NoneType),
        "steps": (int, NoneType),
        "epochs": MAYBE,
        "time_limit": MAYBE,
    },
    "totals": {
        "parameters_before": int,
        "parameters_after": int,
        "ratio": NUMBER,
        "bytes_before": int,
        "bytes_after": int,
        "macs_per_step_before": int,
        "macs_per_step_after": int,
        "model_parameters_before": int,
        "model_parameters_after": int,
    },
    "layers": [LAYER],
    "quality": {
        "metric": (str, NoneType),
        "higher_is_better": bool,
        "dense": MAYBE,
        "decomposed": MAYBE,
        "finetuned": MAYBE,
        "metrics": {str: {str: NUMBER}},
    },
    "frontier": list,
    "left": {str: str},
    "latency": (dict, NoneType),
    "timings_s": {"statistics": MAYBE, "decompose": MAYBE, "finetune": MAYBE, "evaluate": MAYBE},
}


def check_report(data: Any) -> None:
    """Fail where parsed JSON is not a report of the contract: other keys, other types, sums that do not add up."""
    _check(data, REPORT, "report")
    assert data["schema"] == "htcompress.report/1"
    totals, layers = data["totals"], data["layers"]
    for when in ("before", "after"):
        assert totals[f"parameters_{when}"] == sum(layer[f"parameters_{when}"] for layer in layers)
        assert totals[f"parameters_{when}"] <= totals[f"model_parameters_{when}"]
    for layer in layers:
        assert layer["scope"] in SHARE
        assert sum(matrix["parameters"] for matrix in layer["matrices"]) <= layer["parameters_after"]
    if data["request"]["budget"] is not None:
        assert totals["parameters_after"] <= data["request"]["budget"]
    assert sum(data["request"][goal] is not None for goal in ("budget", "error", "ratio")) == 1


def _check(value: Any, expected: Any, where: str) -> None:
    if isinstance(expected, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            _check(item, expected[0], f"{where}[{index}]")
    elif isinstance(expected, dict) and str in expected:
        assert isinstance(value, dict), where
        for key, item in value.items():
            _check(item, expected[str], f"{where}.{key}")
    elif isinstance(expected, dict):
        assert isinstance(value, dict), where
        assert set(value) == set(expected), where
        for key, item in value.items():
            _check(item, expected[key], f"{where}.{key}")
    else:
        allowed = expected if isinstance(expected, tuple) else (expected,)
        assert isinstance(value, allowed), f"{where} is {value!r}"
        assert not isinstance(value, bool) or bool in allowed, f"{where} is {value!r}"

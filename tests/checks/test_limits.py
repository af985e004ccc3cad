"""Limits as they are written in options and configurations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from htcompress.checks import RULES, Target, parse_limit, read_targets
from htcompress.errors import RequestError

COUNTS = ("max_parameters", "max_bytes", "max_macs")
CHANGES = [name for name, rule in RULES.items() if rule.change]


@pytest.mark.parametrize(
    ("name", "text", "value", "share"),
    [
        ("max_parameters", "5k", 5000, False),
        ("max_parameters", 5000, 5000, False),
        ("max_parameters", 5000.0, 5000, False),
        ("min_ratio", "1.5k", 1500, False),
        ("min_metric", -3.25, -3.25, False),
        ("max_drop", "-0.01", -0.01, False),
        ("max_output_error", 0, 0, False),
        ("max_output_error", "0.05", 0.05, False),
        ("max_parameters_change", "5%", 0.05, True),
        ("max_parameters_change", " 2.5 % ", 0.025, True),
        ("max_parameters_change", "250", 250, False),
        ("max_parameters_change", 0, 0, False),
        ("max_metric_change", "1%", 0.01, True),
        ("max_bytes", "5 kB", 5000, False),
        ("max_bytes", "1.5 KiB", 1536, False),
        ("max_bytes_change", "250B", 250, False),
        ("max_output_error_change", 0.02, 0.02, False),
    ],
)
def test_values(name: str, text: float | str, value: float, share: bool) -> None:
    limit = parse_limit(name, text)
    assert limit.rule is RULES[name]
    assert (limit.value, limit.share) == (pytest.approx(value, abs=0), share)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "value", ["many", "", "%", "nan", "1e999", math.nan, math.inf, True, None, [1], {"a": 1}, "5 kBs/s"]
)
def test_no_values(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"^a\.toml: {name} is .*; found "):
        parse_limit(name, value, where=f"a.toml: {name}")


@pytest.mark.parametrize("name", [name for name in RULES if name not in CHANGES])
def test_a_share_is_refused_where_it_is_none(name: str) -> None:
    with pytest.raises(RequestError, match="found '5%'") as error:
        parse_limit(name, "5%")
    if name not in (*COUNTS, "min_ratio"):
        assert "Write 0.05" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_parameters", 0, "above 0"),
        ("max_parameters", -5, "above 0"),
        ("max_bytes", 0.5, "whole number"),
        ("max_bytes", "1 km", "20000, 20k or 20kB"),
        ("max_parameters", "1kB", "whole number"),
        ("min_ratio", 0, "above 0"),
        ("max_output_error", 5, "Write 0.05 for 5 %"),
        ("max_output_error", -0.1, "between 0 and 1"),
        ("max_parameters_change", 0.05, "'5%'"),
        ("max_parameters_change", -1, "at least 0"),
        ("max_parameters_change", "-1%", "found '-1%'"),
        ("max_metric_change", -0.01, "at least 0"),
    ],
)
def test_values_that_make_no_sense(name: str, value: float | str, words: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_limit(name, value)
    assert str(error.value).startswith(f"{name} ")
    assert words in str(error.value)


def test_unknown_names() -> None:
    with pytest.raises(RequestError, match="did you mean max_parameters"):
        parse_limit("max_paramters", 5)


def test_limits_of_options_go_first_then_the_targets_then_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "limits.toml"
    config.write_text(
        '[tool.htcompress.check]\nmax_drop = 0.01\nmax_bytes = "40k"\nmax_macs = "1m"\nbaseline = "old"\n'
        '[tool.htcompress.check.small]\nreport = "small-ht"\nmax_parameters_change = "5%"\nmax_bytes = "20k"\n'
        '[tool.htcompress.check.large]\nreport = "deep/large-ht"\nbaseline = "older"\nmax_metric_change = 0.0\n'
    )
    small, large = read_targets(config=config, options={"max_macs": "2m"})
    values = {limit.rule.name: limit.value for limit in small.limits}
    assert values == {"max_drop": 0.01, "max_bytes": 20_000, "max_macs": 2_000_000, "max_parameters_change": 0.05}
    assert (small.name, small.report, small.baseline) == ("small", tmp_path / "small-ht", tmp_path / "old")
    assert (large.name, large.report, large.baseline) == ("large", tmp_path / "deep/large-ht", tmp_path / "older")
    (alone,) = read_targets(Path("elsewhere"), names=["small"], config=config)
    assert (alone.name, alone.report) == ("small", Path("elsewhere"))


def test_the_nearest_pyproject_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.htcompress.check]\nreport = "out"\nmax_parameters = 5000\n')
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    (target,) = read_targets()
    assert target.report == tmp_path / "out"
    # One that says nothing about htcompress stands for none.
    (deep / "pyproject.toml").write_text("[tool.other]\nreport = 1\n")
    with pytest.raises(RequestError, match="needs a report"):
        read_targets()


def test_a_target_is_never_vacuous() -> None:
    ceiling, change = parse_limit("max_parameters", 5), parse_limit("max_parameters_change", 5)
    with pytest.raises(RequestError, match="no limits"):
        Target(Path("out"), ())
    with pytest.raises(RequestError, match="give one with --baseline"):
        Target(Path("out"), (ceiling, change))
    with pytest.raises(RequestError, match="no limit compares with it"):
        Target(Path("out"), (ceiling,), Path("old"))

"""Numbers as people write them."""

from __future__ import annotations

import pytest

from htcompress.errors import RequestError
from htcompress.numbers import real, whole


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5000", 5000),
        ("5k", 5000),
        ("5K", 5000),
        (" 5 k ", 5000),
        ("1.5m", 1_500_000),
        ("0.5k", 500),
        (".5k", 500),
        ("2,000", 2000),
        ("1,234,567", 1_234_567),
        ("2_000", 2000),
        ("1g", 10**9),
        ("1e3", 1000),
        ("+7", 7),
        ("-5", -5),
        ("0", 0),
        ("3.0", 3),
    ],
)
def test_whole_numbers(text: str, number: int) -> None:
    assert whole(text, "--budget", "5000") == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "k",
        ",",
        "5kk",
        "5 000",
        "1.5",
        "0.0001k",
        "5%",
        "2,00",
        "0,5",
        "1,2,3",
        "nan",
        "inf",
        "9" * 400,
        "1e999k",
    ],
)
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        whole(text, "--budget", "5000, 5k or 1.5m")
    assert str(caught.value) == f"--budget is a whole number such as 5000, 5k or 1.5m; found {text!r}."


@pytest.mark.parametrize(
    ("text", "number"), [("0.1", 0.1), ("1e-4", 1e-4), ("100", 100.0), ("1k", 1000.0), ("-1", -1.0)]
)
def test_real_numbers(text: str, number: float) -> None:
    assert real(text, "--error", "0.1") == number


@pytest.mark.parametrize("text", ["", "x", "0,1", "10%", "nan", "inf", "-infinity", "1/2"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        real(text, "--error", "0.1")
    assert str(caught.value) == f"--error is a number such as 0.1; found {text!r}."

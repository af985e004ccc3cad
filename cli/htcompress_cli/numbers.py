"""Numbers as people write them: 5k, 1.5m, 0.1, 5%."""

from __future__ import annotations

import math
import re

from htcompress.errors import RequestError

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def whole(text: str, option: str) -> int:
    """A whole number, with k, m or g for thousands, millions, thousands of millions.

    >>> whole("5k", "--budget"), whole("1.5m", "--budget"), whole("2,000", "--budget")
    (5000, 1500000, 2000)

    Raises `RequestError`, naming the option, where it is none.
    """
    match = re.fullmatch(r"([+-]?[\d,_]*\.?\d*)\s*([kmg]?)", text.strip().lower())
    try:
        if match is None:
            raise ValueError
        value = float(match[1].replace(",", "").replace("_", "")) * _UNITS[match[2]]
        if value != int(value):
            raise ValueError
    except ValueError:
        raise RequestError(f"{option} is a number of parameters such as 5000, 5k or 1.5m; found {text!r}.") from None
    return int(value)


def real(text: str, option: str, example: str) -> float:
    """A number such as 0.1 or 1e-4. Raises `RequestError`, naming the option, where it is none."""
    try:
        value = float(text)
    except ValueError:
        raise RequestError(f"{option} is a number such as {example}; found {text!r}.") from None
    if math.isnan(value):
        raise RequestError(f"{option} is a number such as {example}; found {text!r}.")
    return value

"""Numbers as people write them: 5k, 1.5m, 2,000, 0.1, 1e-4."""

from __future__ import annotations

import math
import re

from htcompress.errors import RequestError

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def whole(text: str, option: str, examples: str) -> int:
    """A whole number, with k, m or g for thousands, millions, thousands of millions.

    >>> [whole(text, "--budget", "5000") for text in ("5k", "1.5m", "2,000")]
    [5000, 1500000, 2000]

    Raises `RequestError`, naming the option, where it is none.
    """
    value = number(text)
    if value is None or value != int(value):
        raise RequestError(f"{option} is a whole number such as {examples}; found {text!r}.")
    return int(value)


def bytes_of(text: str) -> int | None:
    """A number of bytes, with its unit: B, kB, MB, GB in thousands, KiB, MiB, GiB in steps of 1,024; None of others.

    >>> [bytes_of(text) for text in ("20kB", "1.5 MB", "4 KiB", "20k")]
    [20000, 1500000, 4096, None]
    """
    match = re.fullmatch(r"(.*\S)\s*b", text.strip().lower().replace("byte", "b").removesuffix("s"), re.DOTALL)
    if match is None:
        return None
    binary = re.fullmatch(r"(.*?)\s*([kmg])i", match[1], re.DOTALL)
    value = number(match[1] if binary is None else binary[1])
    if value is not None and binary is not None:
        value *= 1024 ** (1 + "kmg".index(binary[2]))
    return None if value is None or value != int(value) else int(value)


def budget_of(value: int | str | None, option: str) -> tuple[int | None, int | None]:
    """A budget as a number of numbers, and as one of bytes; the one that it is not is None.

    >>> [budget_of(value, "--budget") for value in (5000, "5k", "20kB")]
    [(5000, None), (5000, None), (None, 20000)]

    Raises `RequestError`, naming the option, where it is neither.
    """
    if not isinstance(value, str):
        return value, None
    stored = bytes_of(value)
    return (whole(value, option, "5000, 5k, 1.5m or 20kB"), None) if stored is None else (None, stored)


def real(text: str, option: str, examples: str) -> float:
    """A number, with the same units. Raises `RequestError`, naming the option, where it is none."""
    value = number(text)
    if value is None:
        raise RequestError(f"{option} is a number such as {examples}; found {text!r}.")
    return value


def listed(text: str | None) -> list[str]:
    """The parts of a list such as 1k,2k,5k; none of None.

    >>> listed("1k, 2k")
    ['1k', '2k']
    """
    return [] if text is None else [part.strip() for part in text.split(",") if part.strip()]


def number(text: str) -> float | None:
    """A finite number with the same units; None where the text is none.

    >>> number("2.5k"), number("many")
    (2500.0, None)
    """
    match = re.fullmatch(r"(.*?)\s*([kmg]?)", text.strip().lower(), re.DOTALL)
    if match is None:
        return None
    try:
        # A comma parts thousands; it is no decimal point.
        value = float(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", match[1])) * _UNITS[match[2]]
    except ValueError:
        return None
    return value if math.isfinite(value) else None

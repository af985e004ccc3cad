"""The limits that a report can be held against: their names, what they read, how their values are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

from htcompress.errors import RequestError
from htcompress.numbers import bytes_of, number
from htcompress.report.report import Report


class Unit(Enum):
    """What a limit counts in: in words, and an example."""

    COUNT = ("a whole number", "5000 or 5k")
    BYTES = ("a whole number of bytes", "20000, 20k or 20kB")
    RATIO = ("a number", "100")
    METRIC = ("a number in the unit of the task's metric", "0.95")
    RELATIVE = ("a relative error between 0 and 1", "0.05")

    @property
    def counts(self) -> bool:
        """Whether it is counted one by one."""
        return self in (Unit.COUNT, Unit.BYTES)


@dataclass(frozen=True)
class Rule:
    """One limit's meaning.

    `read` finds the quantity in a report (None where it was not measured); `most` tells a ceiling from a floor;
    `change`: the bound is the baseline's quantity, and the limit is how much worse than that it may be.
    """

    name: str
    quantity: str
    unit: Unit
    most: bool
    read: Callable[[Report], float | None]
    change: bool = False

    @property
    def expected(self) -> str:
        """What a value of this limit looks like."""
        words, example = self.unit.value
        return f"{words}, or a share of the baseline such as '5%'" if self.change else f"{words} such as {example}"


@dataclass(frozen=True)
class Limit:
    """A limit with its value; `share`: the value is a part of the baseline's quantity (0.05 for 5%)."""

    rule: Rule
    value: float
    share: bool = False


def output_errors(report: Report) -> dict[str, float | None]:
    """The relative output error of each matrix that was compressed."""
    return {m.name: m.error["outputs"] for layer in report.layers for m in layer.matrices if not m.kept_dense}


def _output_error(report: Report) -> float | None:
    known = [error for error in output_errors(report).values() if error is not None]
    return max(known, default=0.0) if len(known) == len(output_errors(report)) else None


def _drop(report: Report) -> float | None:
    q = report.quality
    if q.dense is None or q.final is None:
        return None
    return q.dense - q.final if q.higher_is_better else q.final - q.dense


def _metric(report: Report) -> float | None:
    return report.quality.final


def _parameters(report: Report) -> float:
    return report.totals.parameters_after


def _bytes(report: Report) -> float:
    return report.totals.bytes_after


def _macs(report: Report) -> float:
    return report.totals.macs_per_step_after


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("max_parameters", "parameters", Unit.COUNT, True, _parameters),
        Rule("min_ratio", "ratio", Unit.RATIO, False, lambda report: report.totals.ratio),
        Rule("max_bytes", "bytes", Unit.BYTES, True, _bytes),
        Rule("max_macs", "macs", Unit.COUNT, True, _macs),
        Rule("min_metric", "metric", Unit.METRIC, False, _metric),
        Rule("max_metric", "metric", Unit.METRIC, True, _metric),
        Rule("max_drop", "drop", Unit.METRIC, True, _drop),
        Rule("max_output_error", "output_error", Unit.RELATIVE, True, _output_error),
        Rule("max_parameters_change", "parameters", Unit.COUNT, True, _parameters, change=True),
        Rule("max_bytes_change", "bytes", Unit.BYTES, True, _bytes, change=True),
        Rule("max_macs_change", "macs", Unit.COUNT, True, _macs, change=True),
        Rule("max_metric_change", "metric", Unit.METRIC, True, _metric, change=True),
        Rule("max_output_error_change", "output_error", Unit.RELATIVE, True, _output_error, change=True),
    )
}
"""The limits by name; a metric's change is a floor where higher is better, which the report tells."""


def nearest(name: str, known: list[str]) -> str:
    """A hint at the name that was probably meant; empty where none is near."""
    found = get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else "."


def parse_limit(name: str, value: Any, *, where: str | None = None) -> Limit:
    """A limit from what stands in a configuration or behind an option.

    >>> parse_limit("max_parameters", "5k").value
    5000.0
    >>> limit = parse_limit("max_parameters_change", "5%")
    >>> limit.value, limit.share
    (0.05, True)

    Args:
        name: the limit's name, a key of `RULES`.
        value: a number, or text such as 5k or (for changes against a baseline) 5%.
        where: what messages call it; by default its name.

    Raises `RequestError` where the name is unknown or the value makes no sense for it.
    """
    where = name if where is None else where
    if name not in RULES:
        raise RequestError(f"there is no limit {name}{nearest(name, list(RULES))} Limits are: {', '.join(RULES)}.")
    rule = RULES[name]
    if isinstance(value, str) and value.strip().endswith("%"):
        return Limit(rule, _share(rule, value.strip(), where), share=True)
    amount = _amount(rule, value) if isinstance(value, str) else value
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not math.isfinite(amount):
        raise RequestError(f"{where} is {rule.expected}; found {_shown(value)}.")
    return Limit(rule, _sensible(rule, float(amount), where, value))


def _amount(rule: Rule, text: str) -> float | None:
    stored = bytes_of(text) if rule.unit is Unit.BYTES else None
    return number(text) if stored is None else stored


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, (str, bool, int, float)) else f"a {type(value).__name__}"


def _share(rule: Rule, text: str, where: str) -> float:
    amount = number(text.removesuffix("%"))
    if amount is None or amount < 0:
        raise RequestError(f"{where} is {rule.expected}; found {text!r}.")
    if rule.change:
        return amount / 100
    if rule.unit is Unit.RELATIVE:
        raise RequestError(f"{where} is {rule.expected}; found {text!r}. Write {amount / 100:g}.")
    if rule.unit is Unit.METRIC:
        raise RequestError(
            f"{where} is in the unit of the task's metric, not a share of it; found {text!r}. Write {amount / 100:g} "
            f"for a metric between 0 and 1, {amount:g} for one in percent."
        )
    raise RequestError(f"{where} is {rule.expected}, not a share; found {text!r}.")


def _sensible(rule: Rule, amount: float, where: str, value: Any) -> float:
    """The value, where its limit could both hold and fail."""
    wrong = RequestError(f"{where} is {rule.expected}; found {_shown(value)}.")
    if rule.unit.counts and not amount.is_integer():
        raise wrong
    if rule.change and amount < 0:
        raise RequestError(
            f"{where} is how much worse than the baseline is allowed, at least 0; found {_shown(value)}."
        )
    if (rule.unit.counts or rule.unit is Unit.RATIO) and not rule.change and amount <= 0:
        raise RequestError(f"{where} is above 0: {rule.expected}; found {_shown(value)}.")
    if rule.unit is Unit.RELATIVE and not 0 <= amount <= 1:
        hint = f" Write {amount / 100:g} for {amount:g} %." if 1 < amount <= 100 else ""
        raise RequestError(f"{where} is {rule.expected}; found {_shown(value)}.{hint}")
    return amount

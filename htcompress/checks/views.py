"""Verdicts as a terminal, a pull request, a build server and a script read them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from htcompress.checks.verdict import Check, Verdict, exit_code
from htcompress.report import words

SCHEMA = "htcompress.check/1"
WIDTH = 80


def found(check: Check) -> str:
    """What was found: 4,987."""
    return _write(check, check.found)


def limit(check: Check) -> str:
    """What is allowed: at most 4,000; for a change: at most 5,250 (5,000 + 5%)."""
    bound = f"{'at most' if check.most else 'at least'} {_write(check, check.bound)}"
    if check.baseline is None:
        return bound
    allowed = f"{100 * check.limit.value:g}%" if check.limit.share else _write(check, check.limit.value)
    return f"{bound} ({_write(check, check.baseline)} {'+' if check.most else '-'} {allowed})"


def miss(check: Check) -> str:
    """By how much it misses: 987 too many (24.7 %)."""
    if check.passed:
        return ""
    counted = check.limit.rule.unit.counts
    word = ("too many" if counted else "too high") if check.most else "too low"
    amount = _write(check, check.miss) if counted else f"{check.miss:.3g}"
    part = (
        f" ({100 * check.miss / abs(check.bound):.3g} %)" if check.bound and check.limit.rule.name != "max_drop" else ""
    )
    return f"{amount} {word}{part}"


def told(check: Check) -> str:
    """A check in one line: found 4,987, at most 4,000: 987 too many (24.7 %)."""
    return f"found {found(check)}, {limit(check)}" + ("" if check.passed else f": {miss(check)}")


def _write(check: Check, value: float) -> str:
    return words.count(round(value)) if check.limit.rule.unit.counts else f"{value:.6g}"


def _title(verdict: Verdict) -> str:
    return verdict.target.name or str(verdict.target.report)


def _state(verdict: Verdict) -> str:
    if verdict.problems:
        return "not checked" if not verdict.checks else f"{len(verdict.problems)} not checked"
    total = len(verdict.checks)
    return f"{total} of {total} hold" if verdict.passed else f"{len(verdict.failures)} of {total} fail"


def to_terminal(verdicts: Sequence[Verdict]) -> RenderableType:
    """The verdicts as something rich can print, 80 columns wide; targets that fail stand first.

    Problems are only counted: the command line tells them on stderr.
    """
    parts: list[RenderableType] = []
    for verdict in sorted((v for v in verdicts if v.checks), key=lambda verdict: verdict.passed):
        state = _state(verdict)
        head = Table.grid(expand=True)
        head.add_column(overflow="fold")
        head.add_column(justify="right", width=cell_len(state) + 2)
        place = f"  {verdict.target.report}" if verdict.target.name is not None else ""
        head.add_row(
            Text.assemble((_title(verdict), "bold"), (place, "dim")),
            Text(state, "bold green" if verdict.passed else "bold red"),
        )
        parts.append(Padding(head, (0, 1)))
        for check in verdict.checks:
            parts.append(_line(check))
        parts.append(Text(""))
    return Group(*parts)


def _line(check: Check) -> RenderableType:
    mark = Text("✓", "green") if check.passed else Text("✗", "bold red")
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=2, justify="right")
    table.add_column(width=max(23, len(check.limit.rule.name)))
    table.add_column(overflow="fold")
    table.add_row(mark, Text(check.limit.rule.name, "" if check.passed else "bold"), told(check))
    if check.advice:
        table.add_row("", "", Text(check.advice, "dim"))
    return Padding(table, (0, 1))


def to_dict(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The verdicts as JSON values (schema `htcompress.check/1`)."""
    return {
        "schema": SCHEMA,
        "passed": exit_code(verdicts) == 0,
        "targets": [
            {
                "name": verdict.target.name,
                "report": str(verdict.target.report),
                "baseline": None if verdict.target.baseline is None else str(verdict.target.baseline),
                "passed": verdict.passed,
                "checks": [
                    {
                        "name": check.limit.rule.name,
                        "limit": f"{100 * check.limit.value:g}%" if check.limit.share else _plain(check.limit.value),
                        "bound": _plain(check.bound),
                        "found": _plain(check.found),
                        "baseline": None if check.baseline is None else _plain(check.baseline),
                        "miss": _plain(check.miss),
                        "passed": check.passed,
                        "advice": check.advice or None,
                    }
                    for check in verdict.checks
                ],
                "problems": list(verdict.problems),
            }
            for verdict in verdicts
        ],
    }


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def to_json(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as JSON text."""
    return json.dumps(to_dict(verdicts), indent=2, allow_nan=False) + "\n"


def to_junit(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as JUnit XML: a suite for each target, a test for each limit."""
    root = ElementTree.Element("testsuites", name="htcompress check")
    for verdict in verdicts:
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=_printable(_title(verdict)),
            tests=str(len(verdict.checks) + len(verdict.problems)),
            failures=str(len(verdict.failures)),
            errors=str(len(verdict.problems)),
        )
        for check in verdict.checks:
            case = _case(suite, verdict, check.limit.rule.name)
            if not check.passed:
                ElementTree.SubElement(case, "failure", message=told(check), type="limit").text = check.advice
        for problem in verdict.problems:
            case = _case(suite, verdict, problem.split(":")[0])
            ElementTree.SubElement(case, "error", message=_printable(problem), type="not checked")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, verdict: Verdict, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=_printable(f"htcompress.check.{_title(verdict)}"), name=_printable(name)
    )


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "?", text)


def to_annotations(verdicts: Sequence[Verdict]) -> list[str]:
    """Workflow commands that GitHub shows on the run and the pull request, one for each failure or problem."""
    lines = []
    for verdict in verdicts:
        title = f"htcompress check: {_title(verdict)}"
        failures = [f"{c.limit.rule.name}: {told(c)}. {c.advice}" for c in verdict.failures]
        texts = (*failures, *verdict.problems)
        lines += [f"::error title={_escaped(title, key=True)}::{_escaped(text)}" for text in texts]
    return lines


def _escaped(text: str, *, key: bool = False) -> str:
    """As GitHub's runner reads it back: line breaks and its separators as percent codes."""
    codes = {"%": "%25", "\r": "%0D", "\n": "%0A", **({":": "%3A", ",": "%2C"} if key else {})}
    return "".join(codes.get(letter, letter) for letter in text)


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as Markdown, for a step summary or a comment; targets that fail stand first."""
    lines: list[str] = []
    for verdict in sorted(verdicts, key=lambda verdict: verdict.passed):
        lines += [f"### {'✅' if verdict.passed else '❌'} {_cell(_title(verdict))}: {_state(verdict)}", ""]
        if verdict.checks:
            lines += ["| | limit | found | allowed | misses by | |", "|---|---|---:|---:|---:|---|"]
        for check in verdict.checks:
            mark = "✅" if check.passed else "❌"
            cells = (mark, check.limit.rule.name, found(check), limit(check), miss(check), check.advice)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        lines += ["", *(f"- ❓ {_cell(problem)}" for problem in verdict.problems)] if verdict.problems else []
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"([\\|`<>*_\[\]])", r"\\\1", text.replace("\n", " "))

"""What is to be checked: the targets of `[tool.htcompress.check]` in pyproject.toml, and of the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htcompress.checks.limits import RULES, Limit, nearest, parse_limit
from htcompress.errors import RequestError

SECTION = "tool.htcompress.check"
PLACES = ("report", "baseline")
_MOST_BYTES = 1 << 22
"""Of a pyproject.toml: a thousand times what one has."""
_MOST = 1 << 62
"""No limit is larger: nothing that is counted comes near."""


@dataclass(frozen=True)
class Target:
    """A report, the limits it is held against, and the report of an earlier state where limits compare with one."""

    report: Path
    limits: tuple[Limit, ...]
    baseline: Path | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Raises `RequestError` where the check could not fail, or compares with nothing."""
        called = f"target {self.name}" if self.name is not None else str(self.report)
        changes = [limit.rule.name for limit in self.limits if limit.rule.change]
        if self.baseline is None and changes:
            raise RequestError(f"{called}: {changes[0]} compares with an earlier report; give one with --baseline.")
        if self.baseline is not None and not changes:
            names = ", ".join(name for name, rule in RULES.items() if rule.change)
            raise RequestError(
                f"{called}: a baseline, but no limit compares with it. Say how much worse it may be: {names}."
            )
        if not self.limits:
            raise RequestError(
                f"{called}: no limits, so the check could not fail. Give some as options (--max-parameters 5000, "
                f"--max-drop 0.01) or as keys of [{SECTION}] in pyproject.toml."
            )


@dataclass(frozen=True)
class _Section:
    """One table of the configuration, parsed: its limits by name, and its paths."""

    limits: Mapping[str, Limit]
    places: Mapping[str, Path]


@dataclass(frozen=True)
class _Config:
    source: Path
    defaults: _Section
    targets: Mapping[str, _Section]


def read_targets(
    report: Path | None = None,
    *,
    names: Sequence[str] = (),
    config: Path | None = None,
    options: Mapping[str, str] | None = None,
    baseline: Path | None = None,
) -> tuple[Target, ...]:
    """What the command line and the configuration ask to be checked.

    Limits of options go before those of a target, which go before those that stand in `[tool.htcompress.check]`
    itself. Paths in the configuration are relative to its file.

    Args:
        report: a report or an output directory; None for the targets of the configuration.
        names: the targets to check; none for all of them.
        config: the TOML file; by default the nearest pyproject.toml in this folder or above.
        options: limits by name, as written on the command line.
        baseline: an earlier report that changes are measured against.

    Raises `RequestError` where keys are unknown, values make no sense, or nothing would be checked.
    """
    found = _read(config)
    given = {name: parse_limit(name, text, where=_option(name)) for name, text in (options or {}).items()}
    defaults = found.defaults if found is not None else _Section({}, {})
    sections = found.targets if found is not None else {}
    for name in names:
        if name not in sections:
            known = f" Targets are: {', '.join(sections)}." if sections else f" Write one as [{SECTION}.{name}]."
            raise RequestError(f"there is no target {name!r}{nearest(name, list(sections))}{known}")
    if report is not None and len(names) > 1:
        raise RequestError(
            f"{report} can be held against one target's limits at a time; found --target {len(names)} times."
        )

    def target(name: str | None, section: _Section, place: Path | None) -> Target:
        earlier = baseline or section.places.get("baseline") or defaults.places.get("baseline")
        limits = tuple({**defaults.limits, **section.limits, **given}.values())
        return Target(section.places["report"] if place is None else place, limits, earlier, name)

    if report is not None and not names:
        if sections and not (given or defaults.limits):
            raise RequestError(
                f"no limits for {report}. Give some as options, or say which target's limits hold for it: "
                f"--target {next(iter(sections))}."
            )
        return (target(None, defaults, report),)
    if sections:
        if not names and baseline is not None and len(sections) > 1:
            raise RequestError("--baseline is one report, but several targets are checked; choose one with --target.")
        return tuple(target(name, sections[name], report) for name in dict.fromkeys(names or sections))
    if "report" in defaults.places:
        return (target(None, defaults, None),)
    raise RequestError(
        f"check needs a report: give an output directory or its report.json, or targets as [{SECTION}.NAME] in "
        f"pyproject.toml."
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read(path: Path | None) -> _Config | None:
    """The configuration; None where no file was named and the nearest has no section for htcompress."""
    source = path if path is not None else _nearest_file()
    if source is None:
        return None
    try:
        size = source.stat().st_size
        text = source.read_text(encoding="utf-8") if size <= _MOST_BYTES else ""
    except (OSError, ValueError) as error:
        raise RequestError(f"{source} cannot be read: {error}.") from error
    if size > _MOST_BYTES:
        raise RequestError(f"{source} has {size} bytes; expected at most {_MOST_BYTES}.")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a plain ValueError
        raise RequestError(f"{source} is not valid TOML: {' '.join(str(error).split())[:200]}.") from error
    tool = _table(data, "tool", "tool", source)
    ours = _table(tool, "htcompress", "tool.htcompress", source)
    unknown = [key for key in ours if key != "check"]
    if unknown:
        raise RequestError(f"{source}: [tool.htcompress] has an unknown key {unknown[0]!r}; known is check.")
    if "check" not in ours:
        if path is None:
            return None
        raise RequestError(f"{source} has no [{SECTION}]. Write limits there, such as max_parameters = 5000.")
    section = _table(ours, "check", SECTION, source)
    targets = {key: value for key, value in section.items() if isinstance(value, dict)}
    own = {key: value for key, value in section.items() if key not in targets}
    defaults = _section(own, SECTION, source)
    if targets and "report" in defaults.places:
        raise RequestError(f"{source}: report stands in [{SECTION}] beside named targets; move it to one of them.")
    parsed = {name: _section(table, f"{SECTION}.{name}", source) for name, table in targets.items()}
    for name, table in parsed.items():
        if "report" not in table.places:
            raise RequestError(f'{source}: [{SECTION}.{name}] has no report. Say which: report = "model-ht".')
        if not {**defaults.limits, **table.limits}:
            raise RequestError(f"{source}: [{SECTION}.{name}] has no limits. Give some, such as max_parameters = 5000.")
    return _Config(source, defaults, parsed)


def _nearest_file() -> Path | None:
    here = Path.cwd()
    return next((p for folder in (here, *here.parents) if (p := folder / "pyproject.toml").is_file()), None)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # a number of thousands of digits
        return f"one {type(value).__name__}"


def _table(data: Mapping[str, Any], key: str, name: str, source: Path) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise RequestError(f"{source}: {name} is a table, [{name}]; found a {type(value).__name__}.")
    return value


def _section(table: Mapping[str, Any], name: str, source: Path) -> _Section:
    limits: dict[str, Limit] = {}
    places: dict[str, Path] = {}
    for key, value in table.items():
        where = f"{source}: [{name}] {key}"
        if key in PLACES:
            if not isinstance(value, str) or not value.strip() or "\0" in value:
                raise RequestError(f"{where} is the path of a report or an output directory; found {_shown(value)}.")
            places[key] = source.parent / value
        elif key in RULES:
            # Quotes are for units only: a quoted number is a slip that other tools would read as text.
            if isinstance(value, str) and value.strip()[-1:].isdigit():
                raise RequestError(f"{where} is a number; found the text {value!r:.80}. Write it without quotes.")
            if isinstance(value, int) and abs(value) > _MOST:
                raise RequestError(f"{where} is larger than anything that is counted. Write a number below {_MOST}.")
            limits[key] = parse_limit(key, value, where=where)
        else:
            known = [*RULES, *PLACES]
            raise RequestError(
                f"{source}: [{name}] has an unknown key {key!r}{nearest(key, known)} Known are: {', '.join(known)}."
            )
    return _Section(limits, places)

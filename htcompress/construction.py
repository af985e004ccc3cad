"""What `--model` and data files ask for: text alone, which a report keeps and a command line repeats."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from htcompress.errors import RequestError


@dataclass(frozen=True)
class DataFile:
    """The data of a model that is run from its own file.

    Args:
        calibration: an `.npz` file with an array for each input.
        targets: the name of an array of it to measure against.
        metric: what is measured, by default accuracy.
    """

    calibration: str
    targets: str | None = None
    metric: str | None = None

    def options(self) -> tuple[tuple[str, str | None, None], ...]:
        """The options that ask for it, their values and defaults."""
        return _data_options(self)

    def to_report(self) -> dict[str, str | None]:
        """What a report keeps of it."""
        return asdict(self)

    @classmethod
    def of_report(cls, said: Mapping[str, Any]) -> DataFile:
        """The inverse of `to_report`. Raises `TypeError` or `KeyError` where it is none."""
        words = [said["calibration"], said.get("targets"), said.get("metric")]
        if not all(isinstance(word, str) for word in words if word is not None) or words[0] is None:
            raise TypeError("its data are not told in text")
        return cls(*words)


@dataclass(frozen=True)
class Constructed:
    """A model that a class makes, and arrays as its data: in place of a task (see `htcompress.plain_task`).

    Args:
        name: of the class, `package.module:Class` or `file.py:Class`.
        arguments: what it is constructed with, by name; values of JSON.
        calibration: an `.npz` file with an array for each input.
        targets: the name of an array of it to measure against.
        metric: what is measured, by default accuracy.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    targets: str | None = None
    metric: str | None = None

    @classmethod
    def of_options(cls, name: str | None, arguments: str | None, *data: Any) -> Constructed | None:
        """In the words of the command line; None where no class is named.

        >>> Constructed.of_options("model:Tagger", '{"hidden": 8}').arguments
        {'hidden': 8}

        Raises `RequestError` where a word makes no sense.
        """
        if name is None and arguments is not None:
            raise RequestError("--model-arguments needs --model, the class that takes them.")
        if name is None:
            return None
        try:
            found = {} if arguments is None else json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"--model-arguments is a JSON object such as '{{\"hidden\": 256}}': {error}.") from error
        if not isinstance(found, dict):
            raise RequestError(
                f"--model-arguments is a JSON object such as '{{\"hidden\": 256}}'; found {arguments!r:.100}."
            )
        return cls(name, found, *(None if word is None else str(word) for word in data))

    def options(self) -> tuple[tuple[str, str | None, None], ...]:
        """The options that ask for it, their values and defaults."""
        return (
            ("--model", self.name, None),
            ("--model-arguments", json.dumps(dict(self.arguments)) if self.arguments else None, None),
            *_data_options(self),
        )

    def command(self) -> str:
        """The options as they are typed."""
        return shlex.join(
            [word for option, value, _ in self.options() if value is not None for word in (option, value)]
        )

    def to_report(self) -> dict[str, str | None]:
        """What a report keeps of it; the arguments as JSON text."""
        return {**asdict(self), "arguments": json.dumps(dict(self.arguments))}

    @classmethod
    def of_report(cls, said: Mapping[str, Any]) -> Constructed:
        """The inverse of `to_report`. Raises `TypeError` or `KeyError` where it is none."""
        words = [said["name"], said["arguments"], *(said.get(name) for name in ("calibration", "targets", "metric"))]
        if not all(isinstance(word, str) for word in words[:2] + [word for word in words[2:] if word is not None]):
            raise TypeError("its model is not told in text")
        try:
            arguments = json.loads(words[1])
        except (ValueError, RecursionError) as error:
            raise TypeError("the arguments of its model are no JSON") from error
        if not isinstance(arguments, dict):
            raise TypeError("the arguments of its model have no names")
        return cls(words[0], arguments, *words[2:])


def _data_options(told: DataFile | Constructed) -> tuple[tuple[str, str | None, None], ...]:
    return tuple((f"--{name}", getattr(told, name), None) for name in ("calibration", "targets", "metric"))

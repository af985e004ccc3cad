"""JSON as dataclasses by way of msgspec: what does not fit is refused, and told by its place. And the JSON Schemas."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

from htcompress.errors import CheckpointError

Made = TypeVar("Made")

MOST = 1 << 62
"""No number of a report is larger; views compute with them."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
"""A whole number of things."""


@dataclass(frozen=True)
class _Named:
    """What every file of ours has."""

    schema: Any = None


def decoded(cls: type[Made], text: str, schema: str) -> Made:
    """A dataclass from JSON text whose `schema` is the one that is expected. Fields that are not known are passed over.

    Raises:
        ValueError: it is no JSON, or does not fit; the message ends a sentence about the file.
        CheckpointError: it is of another schema; the message lacks the file's name.
    """
    try:
        found = msgspec.json.decode(text, type=_Named).schema
        if found != schema:
            raise CheckpointError(f"has the schema {shown(found)}; expected {schema!r}.")
        return msgspec.json.decode(text, type=cls)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ValueError(_in_our_words(error)) from error


def converted(cls: type[Made], value: Any) -> Made:
    """A JSON value as a type of ours.

    Raises:
        ValueError: it does not fit; the message is `place: what was expected`, or the latter alone.
    """
    try:
        return msgspec.convert(value, cls)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(_in_our_words(error)) from error


def _in_our_words(error: BaseException) -> str:
    """totals.ratio: expected float, got bool."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    what, _, place = str(error).partition(" - at ")
    what = what.replace("`", "").replace("Object missing required field", "it lacks")
    what = re.sub(r"^[A-Z][a-z]", lambda found: found[0].lower(), what)
    at = re.sub(r"^\$\.?", "", place.strip("`"))
    return f"{at}: {what}" if at else what[:200]


def schema_of(cls: type[Any], name: str) -> dict[str, Any]:
    """The JSON Schema of a dataclass of ours."""
    return {"$id": name, **msgspec.json.schema(cls)}


def shown(value: Any) -> str:
    """A JSON value in a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"{value!r:.80}"
    return text if len(text) <= 80 else f"{text[:80]}..."

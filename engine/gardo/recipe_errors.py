"""What is wrong with a recipe, for its user: file (or --set), field, value, mend, on one line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

Origin = dict[tuple[str, ...], str]  # field -> the --set that it came from


class RecipeError(Exception):
    """A recipe that cannot be used; the message is for the user."""


_WEIGHTS = ("lora", "full")  # the tags of train.weights, which pydantic puts into locations


def where(location: tuple[str, ...], source: str, origin: Origin) -> str:
    """The --set that a field came from, or the file and the field."""
    field = ".".join(location)
    for end in range(len(location), 0, -1):
        if name := origin.get(location[:end]):
            return name if end == len(location) else f"{name}: {field}"
    return f"{source}: {field}"


def placed(error: Exception, source: str, origin: Origin) -> str:
    """A message that opens with its field, behind where that field came from."""
    field, _, rest = str(error).partition(": ")
    if not rest:
        return f"{source}: {error}"
    return f"{where(tuple(field.split('.')), source, origin)}: {rest}"


def explain(schema: type[BaseModel], error: Any, source: str, origin: Origin) -> str:
    """One line of a pydantic error: file (or --set), field, value, mend."""
    location = tuple(str(part) for part in error["loc"] if part not in _WEIGHTS)
    place = where(location, source, origin)
    if error["type"] == "union_tag_not_found":
        return f"{place}: kind is missing; one of {', '.join(_WEIGHTS)}"
    if error["type"] == "extra_forbidden":
        known = _fields_at(schema, error["loc"][:-1])
        close = difflib.get_close_matches(location[-1], known, 1, 0.6)
        mend = (
            f"Did you mean {'.'.join((*location[:-1], close[0]))}?"
            if close
            else f"Known here: {', '.join(sorted(known))}."
        )
        return f"{place}: unknown field. {mend}"
    if error["type"] == "missing":
        return f"{place}: missing, and it has no default"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    shown = "" if isinstance(value, dict) or repr(value) in message else f"{value!r}: "
    return f"{place}: {shown}{message[0].lower()}{message[1:]}"


def _fields_at(schema: Any, location: Sequence[str]) -> list[str]:
    options: list[Any] = [schema]
    for part in location:
        if part in _WEIGHTS:
            options = [o for o in options if part in get_args(o.model_fields["kind"].annotation)]
            continue
        field = options[0].model_fields.get(part)
        annotation = field.annotation if field else None
        options = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")]
        if not options:
            return []
    return list(options[0].model_fields)

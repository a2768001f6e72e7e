"""What is wrong with a recipe, for its user: file (or --set), field, value, mend, on one line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

Origin = dict[tuple[str, ...], str]  # field -> the --set that it came from


class RecipeError(Exception):
    """A recipe that cannot be used; the message is for the user."""


class RankError(RecipeError):
    """What keeps a rank from running that is not the first of its machine; it must say so itself"""


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
    location, variants = _walk(schema, error["loc"])
    place = where(location, source, origin)
    if error["type"] == "union_tag_not_found":
        tags = [tag for variant in variants for tag in _tags(variant)]
        return f"{place}: kind is missing; one of {', '.join(tags)}"
    if error["type"] == "extra_forbidden":
        known = [n for variant in _walk(schema, error["loc"][:-1])[1] for n in variant.model_fields]
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


def _walk(
    schema: type[BaseModel], location: Sequence[Any]
) -> tuple[tuple[str, ...], list[type[BaseModel]]]:
    """The fields of a location, and the settings classes that can stand there.

    Pydantic puts the `kind` of a union's variant into locations; it is no field.
    """
    fields: list[str] = []
    variants = [schema]
    for part in map(str, location):
        if len(variants) > 1:
            variants = [v for v in variants if part in _tags(v)]
            continue
        fields.append(part)
        field = variants[0].model_fields.get(part) if variants else None
        annotation: Any = field.annotation if field else None
        variants = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")]
    return tuple(fields), variants


def _tags(variant: type[BaseModel]) -> tuple[str, ...]:
    return get_args(variant.model_fields["kind"].annotation)

"""What is wrong with a recipe, for its user: file (or --set), field, value, mend, on one line."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

Origin = dict[tuple[str, ...], str]  # field -> the --set that it came from

SHOWN = 200  # characters of a value
LINE = 1000  # of a line, whatever stands in a recipe
LINES = 20  # of what is wrong with one
MENDS = {  # by pydantic's type of an error
    "bool_type": "; write true or false",
    "tuple_type": "; write a list",
}


class RecipeError(Exception):
    """A recipe that cannot be used; the message is for the user: lines of sensible length."""

    def __init__(self, message: str) -> None:
        lines = message.split("\n")
        more = [f"and {len(lines) - LINES} more"] if len(lines) > LINES else []
        super().__init__("\n".join([*map(_line, lines[:LINES]), *more]))


def _line(text: str) -> str:
    """What prints of it, cut in its middle: it opens with the field and ends with the mend."""
    text = text if len(text) <= LINE else f"{text[: LINE // 2]} ... {text[-LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value of a recipe in a message; not all of it where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN
    text = short.repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


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


def explained(schema: type[BaseModel], error: ValidationError, source: str, origin: Origin) -> str:
    """A line for each field that is wrong; what a value of several types could be is on one."""
    lines: dict[str, list[str]] = {}
    for one in error.errors():
        place, mend = _explain(schema, one, source, origin)
        lines.setdefault(place, []).append(mend)
    return "\n".join(f"{place}: {', or '.join(dict.fromkeys(m))}" for place, m in lines.items())


def _explain(schema: type[BaseModel], error: Any, source: str, origin: Origin) -> tuple[str, str]:
    """Of one of pydantic's errors: file (or --set), field and value; and the mend."""
    location, variants = _walk(schema, error["loc"])
    place = where(location, source, origin)
    if error["type"] == "union_tag_not_found":
        tags = [tag for variant in variants for tag in _tags(variant)]
        return place, f"kind is missing; one of {', '.join(tags)}"
    if error["type"] == "extra_forbidden":
        known = [n for variant in _walk(schema, error["loc"][:-1])[1] for n in variant.model_fields]
        close = difflib.get_close_matches(location[-1], known, 1, 0.6)
        mend = (
            f"Did you mean {'.'.join((*location[:-1], close[0]))}?"
            if close
            else f"Known here: {', '.join(sorted(known))}."
        )
        return place, f"unknown field. {mend}"
    if error["type"] == "missing":
        return place, "missing, and it has no default"
    message = error["msg"].removeprefix("Value error, ") + MENDS.get(error["type"], "")
    value, said = error["input"], shown(error["input"])
    if isinstance(value, str) and len(value) > SHOWN:
        message = message.replace(repr(value), said)
    own = message.partition(": ")[0]  # a rule between the fields of one section may open with one
    if error["type"] == "value_error" and any(own in _inside(v) for v in variants):
        place, message = where((*location, own), source, origin), message.partition(": ")[2]
    echo = "" if isinstance(value, dict) or said in message else f": {said}"
    return f"{place}{echo}", f"{message[0].lower()}{message[1:]}"


def _walk(
    schema: type[BaseModel], location: Sequence[Any]
) -> tuple[tuple[str, ...], list[type[BaseModel]]]:
    """The fields of a location, and the settings classes that can stand there.

    Pydantic puts the `kind` of a union's variant into locations; it is no field.
    """
    fields: list[str] = []
    variants: list[Any] = [schema]
    for part in map(str, location):
        if len(variants) > 1:
            variants = [v for v in variants if part in _tags(v)]
            continue
        if fields and not variants and not part.isdecimal():
            continue  # what pydantic calls one of several types of a value
        fields.append(part)
        annotation = _inside(variants[0]).get(part) if variants else None
        variants = [a for a in (annotation, *get_args(annotation)) if _inside(a)]
    return tuple(fields), variants


def _inside(kind: Any) -> Mapping[str, Any]:
    """The types of the fields of settings, or of rewards by their names; of nothing else any."""
    if hasattr(kind, "model_fields"):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return kind.__annotations__ if is_typeddict(kind) else {}


def _tags(variant: type[BaseModel]) -> tuple[str, ...]:
    return get_args(variant.model_fields["kind"].annotation)

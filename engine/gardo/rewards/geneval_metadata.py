"""What a prompt asks for, as GenEval's own evaluation_metadata.jsonl says it beside the text.

    {"tag": "counting", "include": [{"class": "bench", "count": 3}],
     "exclude": [{"class": "bench", "count": 4}], "prompt": "a photo of three benchs"}
    {"tag": "position", "include": [{"class": "laptop", "count": 1},
     {"class": "cow", "count": 1, "position": ["right of", 0]}], "prompt": ...}

`include`: at least `count` objects of the class; the surest of them have the `color`, and the
`position` seen from those that another entry asks for. `exclude`: fewer than `count`. Where the
`tag` is counting, the number must be met exactly, and an `exclude` of one more says nothing new.

The text may then be in any words. Without `include`, the text itself is read
(geneval_prompts.py).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gardo.rewards.geneval_prompts import (
    CLASSES,
    NUMBERS,
    Asked,
    Colour,
    Relation,
    Request,
    Task,
    known,
    parse,
)
from gardo.types import Prompt

ClassName = Annotated[
    str, AfterValidator(lambda name: known(name, CLASSES, "one of GenEval's 80 classes"))
]


class _Excluded(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: ClassName = Field(alias="class")
    count: int = Field(1, ge=1, le=max(NUMBERS) + 1, strict=True)


class _Included(_Excluded):
    count: int = Field(1, ge=1, le=max(NUMBERS), strict=True)
    color: Colour | None = None
    position: tuple[Relation, int] | None = None


class _Metadata(BaseModel):
    tag: Task
    include: list[_Included] = Field(min_length=1)
    exclude: list[_Excluded] = []


def request_of(prompt: Prompt) -> Request:
    """What the metadata asks for, or without an `include` there, the text.

    ValueError names the prompt and what GenEval's rules do not know.
    """
    if "include" not in prompt.metadata:
        return parse(prompt)
    try:
        return _request(_Metadata.model_validate(dict(prompt.metadata)))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        shown = "" if first["type"] == "missing" else f"{first['input']!r}: "
        problem = f"{place}: {shown}{first['msg'].removeprefix('Value error, ')}"
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{str(prompt)!r}: the metadata asks for no GenEval picture: {problem}")


def _request(said: _Metadata) -> Request:
    objects = tuple(Asked(one.name, one.count, one.color) for one in said.include)
    absent = tuple(
        Asked(one.name, one.count)
        for one in said.exclude
        if said.tag != "counting" or Asked(one.name, one.count - 1) not in objects
    )
    placed = [(at, one.position) for at, one in enumerate(said.include) if one.position]
    if not placed:
        return Request(said.tag, objects, absent=absent)
    (at, (relation, seen_from)), *more = placed
    if more or len(objects) != 2 or seen_from != 1 - at:
        raise ValueError(
            "include: a position is that of one of two objects, seen from the other, as in "
            '[{"class": "laptop"}, {"class": "cow", "position": ["right of", 0]}]'
        )
    return Request(said.tag, (objects[at], objects[seen_from]), relation, absent)

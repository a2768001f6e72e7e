"""What all settings share: unknown fields, other types, NaN and infinities are refused."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

T = TypeVar("T")
VISIBLE = "CUDA_VISIBLE_DEVICES"
VISIBLE_AT_FIRST = "GARDO_CUDA_VISIBLE_DEVICES"  # what it was before a launcher set it; "": not set
BUILTIN = Path(__file__).parent / "tiny" / "weights"
PUBLISHED = Path(__file__).parent / "published"  # configurations of models, by their hub ids


def model_path(path: str) -> str:
    """A folder, a hub id, or "builtin:NAME" for a model that ships with the package."""
    if path.startswith("builtin:"):
        return str(BUILTIN / path.removeprefix("builtin:"))
    return os.path.expanduser(path)


def config_folder(path: str) -> Path | None:
    """A folder here with the configuration of a model, and perhaps nothing else: its own, or the
    one that ships for a hub id. None where there is none."""
    for folder in (Path(model_path(path)), PUBLISHED / path.replace("/", "--")):
        if os.path.isdir(folder):
            return folder
    return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. ValueError where it is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}; get it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__}, no object; get it again")
    return found


def read_value(path: Path, name: str, kind: type[T]) -> T:
    """A value of a model's configuration. ValueError where there is none of this type."""
    value = read_object(path).get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{str(path)!r} has no {name} ({kind.__name__}); get it again")
    return value


def is_hub_id(path: str) -> bool:
    """owner/name, unless it starts like a path or `owner` is a folder here."""
    owner, slash, name = path.partition("/")
    looks_local = path.startswith(("builtin:", ".", "/", "~")) or not slash or "/" in name
    return not looks_local and not os.path.isdir(owner)


class FieldError(ValueError):
    """What is wrong with a field of a recipe, where no recipe is at hand; opens with the field."""


def check_installed(package: str, field: str) -> None:
    """FieldError where a package that a field's value needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise FieldError(f"{field}: needs {package}, which is not here; pip install {package}")


class Strict(BaseModel):
    """Base of every settings class."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """A field that a class says anew, with another default, keeps its base's description."""
        schema = handler(core_schema)
        for name, field in handler.resolve_ref_schema(schema).get("properties", {}).items():
            if "description" not in field and (inherited := described(cls, name)):
                field["description"] = inherited
        return schema


def described(settings: type[BaseModel], name: str) -> str | None:
    """What the nearest base of a settings class says of a field."""
    fields = [base.model_fields.get(name) for base in settings.__mro__ if issubclass(base, Strict)]
    return next((field.description for field in fields if field and field.description), None)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[T, T], BeforeValidator(_tuple)]  # a YAML list of two

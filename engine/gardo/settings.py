"""What all settings share: unknown fields, other types, NaN and infinities are refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

T = TypeVar("T")
BUILTIN = Path(__file__).parent / "tiny" / "weights"
PUBLISHED = Path(__file__).parent / "published"  # configurations of models, by their hub ids


def model_path(path: str) -> str:
    """A folder, a hub id, or "builtin:NAME" for a model that ships with the package."""
    if path.startswith("builtin:"):
        return str(BUILTIN / path.removeprefix("builtin:"))
    return str(Path(path).expanduser()) if path.startswith("~") else path


def config_folder(path: str) -> Path | None:
    """A folder here with the configuration of a model, and perhaps nothing else: its own, or the
    one that ships for a hub id. None where there is none."""
    for folder in (Path(model_path(path)), PUBLISHED / path.replace("/", "--")):
        if folder.is_dir():
            return folder
    return None


def is_hub_id(path: str) -> bool:
    """owner/name, unless it starts like a path or `owner` is a folder here."""
    owner, slash, name = path.partition("/")
    looks_local = path.startswith(("builtin:", ".", "/", "~")) or not slash or "/" in name
    return not looks_local and not Path(owner).is_dir()


class FieldError(ValueError):
    """What is wrong with a field of a recipe, where no recipe is at hand; opens with the field."""


def check_installed(package: str, field: str) -> None:
    """FieldError where a package that a field's value needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise FieldError(f"{field}: needs {package}, which is not here; pip install {package}")


class Strict(BaseModel):
    """Base of every settings class."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[T, T], BeforeValidator(_tuple)]  # a YAML list of two

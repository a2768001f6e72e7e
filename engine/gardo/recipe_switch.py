"""`--set algorithm.name=NAME` alone: what the section still says to the algorithm before it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from gardo import plugins
from gardo.recipe_errors import Origin, RecipeError

PACKAGE = "gardo.algorithms"
Location = tuple[str, ...]


def switched(
    before: Any, after: Any, origin: Origin, location: Location = ("algorithm",)
) -> dict[str, Any]:
    """The section `after` overrides, without fields that only say another algorithm's defaults.

    RecipeError where a --set changed its name and it still says more to the algorithm of `before`.
    A section that cannot be understood stays as it is: its own check says why.
    """
    found = dict(after) if isinstance(after, dict) else after
    if not isinstance(before, dict) or not isinstance(after, dict) or location in origin:
        return found
    if isinstance(after.get("base"), dict):
        found["base"] = switched(before.get("base"), after["base"], origin, (*location, "base"))
    name, old = after.get("name"), before.get("name")
    place = (*location, "name")
    if name == old or place not in origin or not isinstance(name, str):
        return found
    try:
        known = plugins.resolve(PACKAGE, name).Settings.model_fields
        fields = plugins.resolve(PACKAGE, str(old)).Settings.model_fields
    except (ValueError, AttributeError):
        return found
    left = [n for n in before if n in found and n not in known and (*location, n) not in origin]
    said = [n for n in left if n in fields and not _is_default(fields[n], before[n])]
    if said:
        raise RecipeError(
            f"{origin[place]}={name}: {_names(said)} of {old} in the recipe, which {name} does not "
            f"have; set the whole section: --set '{_section(location, name, str(old), known)}'"
        )
    return {field: value for field, value in found.items() if field not in left}


def _is_default(field: Any, value: Any) -> bool:
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        given = TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return bool(given == field.get_default(call_default_factory=True))


def _names(fields: list[str]) -> str:
    are = "is a field" if len(fields) == 1 else "are fields"
    return f"{', '.join(fields)} {are}"


def _section(location: Location, name: str, old: str, known: Any) -> str:
    base = f", base: {{name: {old}}}" if "base" in known else ""
    return f"{'.'.join(location)}={{name: {name}{base}}}"

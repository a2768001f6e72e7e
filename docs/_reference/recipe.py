"""docs/reference/recipe.md: every field of recipes and suites, of the JSON schema that checks them.

A part is a JSON schema of an object; `defs` are the definitions that its references name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gardo import plugins
from gardo.algorithms.base import AlgorithmSettings
from gardo.policies.settings import PolicySettings
from gardo.recipe import Recipe
from gardo.rewards.base import RewardSettings
from gardo.settings import Strict
from gardo.suite import Suite

from .markdown import MADE, code, paragraph, prose, slug, table

Schema = dict[str, Any]
PLUG_INS = {  # section -> package, the settings that all of its kinds share, the field that names
    "model": ("gardo.policies", PolicySettings, "family"),
    "algorithm": ("gardo.algorithms", AlgorithmSettings, "name"),
    "rewards": ("gardo.rewards", RewardSettings, "kind"),
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
HEAD = ("field", "value", "default", "meaning")
INTRO = f"""{MADE}

# Every field of a recipe

`gardo schema` prints the same as a JSON schema, for editors. `needed` has no default; `-` is a
section with the defaults of its own fields, and one that changes some of them names those. Sections
stand in the order of a resolved recipe; of models, algorithms and rewards first the fields that all
have, then each one's own. Examples of everything: [recipes/](../../recipes/README.md).
"""
SUITE = """## Every field of a suite

What `gardo eval` asks of models: [suites/](../../suites/README.md)."""


def page() -> str:
    schema = Recipe.model_json_schema()
    lines = [INTRO]
    rest = {k: v for k, v in schema["properties"].items() if not is_section(k, v)}
    for name, field in schema["properties"].items():
        if name in PLUG_INS:
            lines += plug_ins(name, field["description"])
        elif name not in rest:
            part = part_of(field, schema["$defs"])[0]
            part.setdefault("description", sentence(field["description"]))
            lines += [f"## {name}", "", *section(name, part, schema["$defs"], "###", {})]
    lines += ["## kernels", "", *fields({"properties": rest}, schema["$defs"])]
    suite = Suite.model_json_schema()
    lines += [SUITE, "", *section("suite", suite, suite["$defs"], "###", {})]
    return "\n".join(lines).rstrip() + "\n"


def is_section(name: str, field: Schema) -> bool:
    return name in PLUG_INS or "$ref" in json.dumps(field)


def plug_ins(name: str, meaning: str) -> Iterator[str]:
    """A section of plug-ins: the fields of all, then those of each."""
    package, base, naming = PLUG_INS[name]
    yield from (f"## {name}", "", sentence(meaning), "")
    shared = base.model_json_schema()
    yield from fields(shared, {})
    shown: dict[str, str] = {}
    for kind in plugins.names(package):
        settings: type[Strict] = plugins.resolve(package, kind).Settings
        schema = settings.model_json_schema()
        own = {k: v for k, v in schema["properties"].items() if k != naming}
        own = {k: v for k, v in own.items() if not same(v, shared["properties"].get(k))}
        yield from (f"### {name}, {naming}: {kind}", "")
        part = schema | {"properties": own}
        yield from section(f"{kind}: {name}", part, schema.get("$defs", {}), "####", shown)


def same(field: Schema, other: Schema | None) -> bool:
    return other is not None and {**field, "title": ""} == {**other, "title": ""}


def section(
    path: str, part: Schema, defs: dict[str, Schema], mark: str, shown: dict[str, str]
) -> Iterator[str]:
    """A table of the fields, then each section inside it under a heading of its own.

    `shown`: the headings of the sections inside that the page has already, by their schema.
    """
    if part.get("description"):
        yield from (paragraph(part["description"].split("\n\n")[0]), "")
    if part["properties"]:
        yield from fields(part, defs)
    else:
        yield from ("No fields of its own.", "")
    for name, field in part["properties"].items():
        for found in part_of(field, defs):
            which = found["properties"].get("kind", {}).get("const")
            heading = f"{path}.{name}".lstrip(".") + (f", kind: {which}" if which else "")
            whole = json.dumps(found, sort_keys=True)
            if whole in shown:
                link = f"[{shown[whole]}](#{slug(shown[whole])})"
                yield from (f"`{name}` has the fields of {link}.", "")
                continue
            shown[whole] = heading
            yield from (f"{mark} {heading}", "")
            yield from section(f"{path}.{name}", found, defs, mark, shown)


def part_of(field: Schema, defs: dict[str, Schema]) -> list[Schema]:
    """The objects that a field may hold: none for a plain value."""
    if "$ref" in field:
        found = defs[field["$ref"].rpartition("/")[2]]
        return [found] if "properties" in found else []
    inner = [*field.get("anyOf", []), *field.get("oneOf", []), *field.get("allOf", [])]
    if isinstance(field.get("additionalProperties"), dict):
        inner.append(field["additionalProperties"])
    return [part for one in inner for part in part_of(one, defs)]


def fields(part: Schema, defs: dict[str, Schema]) -> list[str]:
    needed = part.get("required", [])
    rows = [
        (
            code(name),
            value_of(field, defs),
            default_of(field, name in needed, defs),
            prose(field["description"]),
        )
        for name, field in part["properties"].items()
    ]
    return table(HEAD, rows)


def value_of(field: Schema, defs: dict[str, Schema]) -> str:
    """Type and limits, in a few words."""
    if "const" in field:
        return code(field["const"])
    if "enum" in field:
        return ", ".join(code(plain(value)) for value in field["enum"])
    if "$ref" in field or "oneOf" in field:
        return (
            value_of(defs[field["$ref"].rpartition("/")[2]], defs)
            if is_plain(field, defs)
            else "section"
        )
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(value_of(one, defs) for one in field["anyOf"]))
    kind = field.get("type", "anything")
    if kind == "array":
        return array_of(field, defs)
    if kind == "object":
        return "sections by name"
    named = {"string": "text", "boolean": "true, false", "null": "null"}.get(kind, kind)
    limits = ", ".join(
        f"{sign} {plain(field[key])}" for key, sign in LIMITS.items() if key in field
    )
    return f"{named} {limits}".strip()


def array_of(field: Schema, defs: dict[str, Schema]) -> str:
    if "prefixItems" in field:
        return f"two of: {value_of(field['prefixItems'][0], defs)}"
    return f"list of {value_of(field.get('items', {}), defs)}"


def is_plain(field: Schema, defs: dict[str, Schema]) -> bool:
    return "$ref" in field and "properties" not in defs[field["$ref"].rpartition("/")[2]]


def default_of(field: Schema, needed: bool, defs: dict[str, Schema]) -> str:
    if needed:
        return "needed"
    value = field.get("default")
    if "default" not in field or isinstance(value, dict):
        return changed(value or {}, part_of(field, defs)) or "-"
    return code(plain(value))


def changed(value: Schema, parts: list[Schema]) -> str:
    """What a section's default says otherwise than the defaults of its own fields."""
    own = {k: v.get("default") for part in parts[:1] for k, v in part["properties"].items()}
    said = [f"{k}: {plain(v)}" for k, v in value.items() if k in own and v != own[k]]
    return code(", ".join(said)) if said else ""


def plain(value: Any) -> str:
    """A value as a recipe has it."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()) if len(text) <= 60 else "(long)"


def sentence(text: str) -> str:
    return f"{prose(text[0].upper() + text[1:])}."

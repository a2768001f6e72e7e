"""Every field of recipes, suites, servers and fits says what it means."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field

from gardo.config import full_schema
from gardo.rewards.fitted import Fit
from gardo.rewards.serving.server import ServeSettings
from gardo.settings import Strict
from gardo.suite import Suite

SCHEMAS = {
    "recipe": full_schema,
    "suite": Suite.model_json_schema,
    "server": ServeSettings.model_json_schema,
    "fit": Fit.model_json_schema,
}


def silent(schema: dict[str, Any]) -> list[str]:
    """The fields without a description, of all definitions too."""
    parts = {"": schema, **schema.get("$defs", {})}
    return [
        f"{part}.{name}"
        for part, definition in parts.items()
        for name, field in definition.get("properties", {}).items()
        if not field.get("description")
    ]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_has_a_description(name: str) -> None:
    assert silent(SCHEMAS[name]()) == []


class Base(Strict):
    rate: float = Field(1.0, description="how fast")
    silent: int = 1


class Derived(Base):
    rate: float = 2.0


class Literally(Derived):
    rate: float = Field(3.0, description="faster")
    kind: Literal["x"] = "x"


def test_a_field_that_is_said_anew_keeps_its_bases_description() -> None:
    assert Derived.model_json_schema()["properties"]["rate"]["description"] == "how fast"
    assert Literally.model_json_schema()["properties"]["rate"]["description"] == "faster"
    assert silent(Literally.model_json_schema()) == [".silent", ".kind"]

"""`gardo schema`: what a recipe may say, for editors."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    gardo schema > recipe.schema.json
    """
    from gardo.config import full_schema

    print(json.dumps(full_schema(), indent=2))

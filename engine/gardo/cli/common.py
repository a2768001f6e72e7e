"""What the commands of `gardo` share: their common options, and how they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

RecipeArgument = Annotated[
    Path, typer.Argument(help="a recipe, such as recipes/tiny_flux_gardo.yaml")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="override a field of the recipe"),
]


def refuse(error: object) -> NoReturn:
    """What is wrong, on standard error; exit code 2."""
    print(error, file=sys.stderr)
    raise typer.Exit(2)

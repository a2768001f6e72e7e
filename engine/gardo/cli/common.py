"""What the commands of `gardo` share: their common options, and how they refuse."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gardo import lazily

if TYPE_CHECKING:
    from gardo.recipe import Recipe

RecipeArgument = Annotated[
    Path, typer.Argument(help="a recipe, such as recipes/tiny_flux_gardo.yaml")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE ...", help="override fields of the recipe"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="as data, for scripts")]

EXIT_CODES = {
    "0": "done",
    "1": "it ran, and something failed: a recipe does not fit, a check failed",
    "2": "bad input, with one line that names the file, the field and the mend",
    "124": "a run hung and its watchdog ended it",
    "128 + n": "ended by signal n",
}

FIELD = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=.*", re.DOTALL)


def spread(words: Sequence[str]) -> list[str]:
    """Arguments in which `--set a=1 b=2` is written `--set a=1 --set b=2`."""
    found: list[str] = []
    for word in words:
        after_value = len(found) > 1 and found[-2] == "--set"
        found += ["--set", word] if after_value and FIELD.fullmatch(word) else [word]
    return found


def checked(recipe: Path, overrides: list[str] | None, *, prompts: bool = True) -> Recipe:
    """The recipe; torch is loaded once it is known to be one."""
    from gardo.config import load
    from gardo.recipe_errors import RecipeError

    try:
        found = load(recipe, overrides or [], prompts=prompts)
    except RecipeError as error:
        refuse(error)
    lazily.load_now()
    return found


def refuse(error: object) -> NoReturn:
    """What is wrong, on standard error; exit code 2."""
    print(error, file=sys.stderr)
    raise typer.Exit(2)

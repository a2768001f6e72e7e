"""`gardo plan`: what a recipe takes, of GPUs that need not be here."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gardo.cli.common import RecipeArgument, SetOption, checked, refuse


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="of each: 80GB, 79GiB")] = "80GB",
    nodes: Annotated[int, typer.Option(min=1, help="machines that they are in")] = 1,
) -> None:
    """Say what a recipe takes of GPUs that need not be here; exit 1 where it does not fit."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    found = checked(recipe, set_, prompts=False)
    from gardo.planner.page import bytes_of, plan_page
    from gardo.recipe_errors import RecipeError

    try:
        room = bytes_of(gpu_memory)
        lines, fits = plan_page(found, world=gpus, room=room, nodes=nodes, source=str(recipe))
    except (RecipeError, ValueError) as error:
        refuse(error)
    print("\n".join(lines))
    raise typer.Exit(int(not fits))

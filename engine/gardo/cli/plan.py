"""`gardo plan`: what a recipe takes, of GPUs that need not be here."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from gardo.cli.common import JsonOption, RecipeArgument, SetOption, checked, refuse


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="of each: 80GB, 79GiB")] = "80GB",
    nodes: Annotated[int, typer.Option(min=1, help="machines that they are in")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe takes of GPUs that need not be here; exit 1 where it does not fit.

    gardo plan recipes/flux_gardo_hpsv2.yaml --gpus 8 --gpu-memory 80GB

    gardo plan recipes/sd3_gardo_ocr.yaml --gpus 1 --gpu-memory 24GB --set model.base=nf4
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    found = checked(recipe, set_, prompts=False)
    from gardo.planner import page
    from gardo.planner.sizes import bytes_of
    from gardo.recipe_errors import RecipeError

    try:
        room = bytes_of(gpu_memory)
        planned = page.plan(found, world=gpus, room=room, nodes=nodes, source=str(recipe))
    except (RecipeError, ValueError) as error:
        refuse(error)
    print(json.dumps(page.as_data(planned), indent=1) if as_json else page.as_text(planned))
    raise typer.Exit(int(not planned.fits))

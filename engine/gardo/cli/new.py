"""`gardo new`: a commented recipe made from a model, rewards and GPUs."""

from __future__ import annotations

import os
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gardo.cli.common import refuse


class Weights(StrEnum):
    LORA = "lora"
    FULL = "full"


def new(
    out: Annotated[Path, typer.Argument(help="the recipe to write, such as my.yaml")],
    model: Annotated[
        str,
        typer.Option(help="flux, sd3, builtin:flux, builtin:sd3, a diffusers folder, or a hub id"),
    ],
    reward: Annotated[
        list[str],
        typer.Option(help="the first is optimised, others check it; `gardo rewards list`"),
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that it is to run on")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="of each: 80GB, 79GiB")] = "80GB",
    weights: Annotated[Weights, typer.Option(help="what trains")] = Weights.LORA,
    algorithm: Annotated[
        str, typer.Option(help="gardo around the model's usual one, or another alone")
    ] = "gardo",
    prompts: Annotated[
        str | None,
        typer.Option(help="a .txt or .jsonl file of prompts; one is written if left out"),
    ] = None,
) -> None:
    """Write a recipe with a comment on every field, from the recipes that come with gardo: a batch
    that splits over the GPUs, what makes it fit in their memory, and prompts if there are none.

    gardo new my.yaml --model builtin:flux --reward tiny_count --gpus 2

    gardo new ocr.yaml --model sd3 --reward ocr --gpus 1 --gpu-memory 24GB

    gardo new words.yaml --model flux --reward hpsv2 --reward aesthetic --algorithm diffusion_nft

    Nothing is written over. Exit code 0: it is written; 1: it is, and does not fit that memory;
    2: refused.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.new.values import Asked
    from gardo.new.write import run_name, write_recipe
    from gardo.planner.sizes import bytes_of
    from gardo.recipe_errors import RecipeError

    options: list[tuple[str, object]] = [
        ("--model", model),
        *(("--reward", name) for name in reward),
        ("--gpus", gpus),
    ]
    options += [
        ("--gpu-memory", gpu_memory),
        ("--weights", weights.value),
        ("--algorithm", algorithm),
    ]
    options += [("--prompts", prompts)] if prompts else []
    command = shlex.join(["gardo", "new", str(out), *(str(w) for o in options for w in o)])
    full = weights is Weights.FULL
    try:
        asked = Asked(
            model=model, rewards=reward, gpus=gpus, room=bytes_of(gpu_memory), full=full,
            algorithm=algorithm, prompts="", prompt=None, held_out=0, name=run_name(out),
        )  # fmt: skip
        lines = write_recipe(out, asked, prompts, command)
    except (RecipeError, ValueError) as error:
        refuse(error)
    print("\n".join(lines))
    raise typer.Exit(int(any(line.endswith("does not fit") for line in lines)))

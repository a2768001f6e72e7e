"""`gardo sample`: pictures of prompts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gardo.cli.common import refuse


def sample(
    out: Annotated[Path, typer.Option(help="the folder to write to: a new or an empty one")],
    model: Annotated[
        str | None,
        typer.Argument(
            help="builtin:flux, a diffusers folder, or a hub id (ID@REVISION); of a --run its own "
            "base if left out"
        ),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="a LoRA on the model: PEFT's folder, or a file of diffusers")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="the folder of a run, whose checkpoint's weights are taken")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="which checkpoint of --run; the newest if left out")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="the average of the run's weights (train.ema)")
    ] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="what to draw; as often as you like")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="a .txt or .jsonl file of prompts instead")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="pictures a prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of the noise")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="denoise steps; of a --run its evaluations', else 28"),
    ] = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="H W", help="pixels; of a --run its own, else the model's"),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="guidance scale; of a --run its own, else the family's")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="nf4 or int8: smaller weights, on a GPU; the run's, or none")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="of a model whose folder or hub id does not tell: flux, sd3")
    ] = None,
) -> None:
    """Draw pictures with a model, a LoRA on it, or a run's weights: NNNNNN.png, grid.png and
    samples.jsonl, which says how each was made.

    gardo sample builtin:flux --prompt "two red circles" --count 4 --out pictures

    gardo sample --run runs/tiny-flux-gardo --prompts recipes/tiny_prompts.txt --out pictures

    The same command draws the same pictures; models get the same noise.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    from gardo.recipe_errors import RecipeError
    from gardo.sample import draw, task

    try:
        asked = task(
            out=out, model=model, lora=lora, run=run, step=step, average=ema, prompts=prompt or (),
            prompts_file=prompts, count=count, seed=seed, steps=steps, size=size,
            guidance=guidance, base=base, family=family,
        )  # fmt: skip
        draw(asked, lambda text: print(text, flush=True))
    except (RecipeError, ValueError) as error:
        refuse(error)
    except torch.cuda.OutOfMemoryError:
        print("the GPU's memory is full: give a smaller --size, or --base nf4", file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        print(f"{error.filename or out}: {error.strerror or error}", file=sys.stderr)
        raise typer.Exit(1) from None

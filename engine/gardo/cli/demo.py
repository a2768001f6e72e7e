"""`gardo demo` and `gardo recipes`: what comes with gardo, run and copied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gardo.cli.common import SetOption, refuse
from gardo.cli.train import train

RECIPE = "tiny_flux_gardo.yaml"


def demo(
    set_: SetOption = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="ranks; two, or one where there is one GPU, if left out"),
    ] = None,
) -> None:
    """Train the built-in tiny Flux with GARDO: minutes on a CPU. Ends with a report and a LoRA.

    gardo demo

    gardo demo --gpus 1 --set run.steps=5
    """
    from gardo import shipped
    from gardo.nvidia import gpus_here

    train(shipped.folder("recipes") / RECIPE, set_, gpus=gpus or min(2, gpus_here()) or 2)


def recipes(
    folder: Annotated[Path, typer.Argument(help="where recipes/ and suites/ are put")] = Path(),
) -> None:
    """Copy the recipes, their prompts and the suites that come with gardo; overwrites nothing.

    gardo recipes

    gardo recipes somewhere
    """
    from gardo import shipped

    try:
        written, left = shipped.copy(folder)
    except OSError as error:
        refuse(f"{folder}: {error.strerror}; name a folder that can be written")
    for part in shipped.PARTS:
        count = sum(path.is_relative_to(folder / part) for path in written)
        print(f"{folder / part}: {count} files written")
    if left:
        print(f"left alone, because they were there: {len(left)}")

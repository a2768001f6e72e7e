"""`gardo doctor`: what this machine can run, and what a recipe needs of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gardo.cli.common import JsonOption, SetOption, checked, refuse

if TYPE_CHECKING:
    from gardo.doctor.finding import Finding
    from gardo.recipe import Recipe


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="a recipe: what it needs is looked for too")
    ] = None,
    set_: SetOption = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="ranks that the recipe is to run on; the GPUs here")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="of each, such as 80GB, where they are not those here")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can run, and whether what a recipe needs is here: models and their
    licences, prompts, packages, batch, memory, disk. No weights are loaded, no hub is asked.

    gardo doctor

    gardo doctor recipes/tiny_flux_gardo.yaml --gpus 2

    gardo doctor recipes/flux_gardo_hpsv2.yaml --gpus 8 --gpu-memory 80GB --json

    Exit code 0: all ok, or notes, with which a run goes on; 1: a problem; 2: no such recipe, or
    refused.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    found = checked(recipe, set_, prompts=False) if recipe else None
    from gardo.doctor.finding import worst
    from gardo.planner.sizes import bytes_of

    try:
        room = bytes_of(gpu_memory) if gpu_memory else None
    except ValueError as error:
        refuse(f"--gpu-memory {error}")
    every: list[tuple[str, Finding]] = []
    for part, finding in _findings(found, str(recipe), gpus, room):
        if not as_json:
            _print(part, finding, after=every[-1][0] if every else "", titled=found is not None)
        every.append((part, finding))
    state = worst(finding for _, finding in every)
    if as_json:
        data = [{"about": part, **finding.as_data()} for part, finding in every]
        print(json.dumps({"findings": data, "worst": state}, indent=1))
    raise typer.Exit(int(state == "problem"))


def _print(part: str, finding: Finding, *, after: str, titled: bool) -> None:
    """A line, behind the title of its part where that begins."""
    if titled and part != after:
        print("\n" * bool(after) + part)
    print(finding.as_text(), flush=True)


def _findings(
    recipe: Recipe | None, source: str, gpus: int | None, room: int | None
) -> Iterator[tuple[str, Finding]]:
    """Those of the machine, then those of the recipe, each with what it is about."""
    from gardo.doctor import machine

    for finding in machine.examine(recipe.kernels if recipe else "auto"):
        yield "machine", finding
    if recipe:
        from gardo.doctor import recipe as needs

        for finding in needs.examine(recipe, source, needs.Where.of(gpus, room)):
            yield "recipe", finding

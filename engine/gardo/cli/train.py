"""`gardo train`: a recipe, on as many ranks as it is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gardo.cli.common import RecipeArgument, SetOption, checked, refuse


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on from the run's newest checkpoint; without one, start"),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="a torch.profiler trace of one step, in the run's folder, for Perfetto",
        ),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="ranks here: GPUs, or CPU processes where there is none; 1"),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="ranks on several machines, by ssh: a line `NAME slots=GPUS` each"),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(help="which GPUs: localhost:4,5, or of a hostfile: node-1@node-2:0,1"),
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="where ranks meet, of a hostfile; else asked of the first")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="where ranks meet; one that is free if left out"),
    ] = None,
    ignore_plan: Annotated[
        bool, typer.Option("--ignore-plan", help="train even what will not fit, by the plan")
    ] = False,
) -> None:
    """Train a recipe; with engine zero through the deepspeed launcher on as many ranks."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    found = checked(recipe, set_)
    from gardo import launch
    from gardo.machine import check_accelerator
    from gardo.nvidia import gpus_here
    from gardo.planner import geometry
    from gardo.recipe import reward_settings
    from gardo.recipe_errors import RecipeError
    from gardo.rewards.assembly import reach_endpoints

    here = gpus_here()
    try:
        if master_addr and not hostfile:
            raise ValueError(f"--master-addr {master_addr}: for a --hostfile; leave it out")
        if port and not (hostfile or launch.is_free(port)):
            raise ValueError(f"--port {port}: another program has it; leave it out")
        where = launch.places(gpus=gpus, hostfile=hostfile, include=include, here=here)
        geometry(found, rank=0, world=where.ranks, source=str(recipe))
        if not hostfile:  # a login node may start what runs elsewhere
            check_accelerator(found, str(recipe))
            reach_endpoints(reward_settings(found), f"{recipe}: rewards.")
        zero = found.distributed.engine == "zero"
        if not zero and where.ranks > 1:
            raise RecipeError(
                f"{recipe}: distributed.engine: local runs in one process; drop {where.option}, "
                "or use engine zero"
            )
        if here or not hostfile:  # else the GPUs are elsewhere: `gardo plan` can be told of them
            _say_plan(found, str(recipe), where.ranks, on_gpu=here > 0, ignore=ignore_plan)
        arguments = [str(recipe), *(part for o in set_ or () for part in ("--set", o))]
        arguments += ["--resume"] if resume else []
        arguments += ["--profile"] if profile else []
        command = launch.command(where, arguments, master=master_addr, port=port, launched=zero)
    except (RecipeError, ValueError) as error:
        refuse(error)
    raise typer.Exit(launch.run(where, command, on_cpu=not here))


def _say_plan(recipe: Any, source: str, world: int, *, on_gpu: bool, ignore: bool) -> None:
    """Prints the plan's verdict. RecipeError where the recipe does not fit, unless `ignore`.

    The built-in models are too small to ask. Any other error means that there is no plan, which
    must not keep a run from starting.
    """
    if recipe.model.path.startswith("builtin:"):
        return
    import torch

    from gardo.distributed.base import host_memory
    from gardo.planner.verdict import verdict
    from gardo.recipe_errors import RecipeError

    here = range(torch.cuda.device_count() if on_gpu else 0)
    rooms = [torch.cuda.get_device_properties(i).total_memory for i in here]
    try:
        said = verdict(
            recipe, world=world, room=min(rooms, default=host_memory(world)), source=source
        )
    except RecipeError as error:
        if not ignore:
            raise
        said = str(error)
    except Exception as error:  # a model of one's own may do what no plan foresees
        said = f"no plan: {type(error).__name__}: {error}"
    print(said, flush=True)

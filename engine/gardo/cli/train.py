"""`gardo train`: a recipe, on as many ranks as it is told."""

from __future__ import annotations

import os
import shlex
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
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="check all that is checked before a run, say what would be started, and start "
            "nothing; GPUs of --gpus need not be here then",
        ),
    ] = False,
) -> None:
    """Train a recipe; with engine zero through the deepspeed launcher on as many ranks.

    gardo train recipes/tiny_flux_gardo.yaml --gpus 2 --set train.optimizer.lr=5e-4 run.steps=20

    gardo train runs/tiny-flux-gardo/recipe.yaml --gpus 2 --resume

    Exit code 0: done, or asked to end and saved; 1: it failed; 2: refused before anything began;
    124: it hung; 128 + N: ended by signal N.
    """
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
    elsewhere = bool(hostfile or (dry_run and gpus and here < gpus))  # where a login node starts it
    try:
        if master_addr and not hostfile:
            raise ValueError(f"--master-addr {master_addr}: for a --hostfile; leave it out")
        if port and not (hostfile or launch.is_free(port)):
            raise ValueError(f"--port {port}: another program has it; leave it out")
        where = launch.places(
            gpus=gpus,
            hostfile=hostfile,
            include=include,
            here=max(here, gpus or 0) if elsewhere and not hostfile else here,
        )
        geometry(found, rank=0, world=where.ranks, source=str(recipe))
        if not elsewhere:
            check_accelerator(found, str(recipe))
            reach_endpoints(reward_settings(found), f"{recipe}: rewards.")
        zero = found.distributed.engine == "zero"
        if not zero and where.ranks > 1:
            raise RecipeError(
                f"{recipe}: distributed.engine: local runs in one process; drop {where.option}, "
                "or use engine zero"
            )
        if here or not elsewhere:  # else `gardo plan` can be told of the GPUs
            _say_plan(found, str(recipe), where.ranks, on_gpu=here > 0, ignore=ignore_plan)
        arguments = [str(recipe), *(part for o in set_ or () for part in ("--set", o))]
        arguments += ["--resume"] if resume else []
        arguments += ["--profile"] if profile else []
        command = launch.command(where, arguments, master=master_addr, port=port, launched=zero)
    except (RecipeError, ValueError) as error:
        refuse(error)
    if dry_run:
        _say_start(found, command, resume=resume, checked=not elsewhere)
        return
    raise typer.Exit(launch.run(where, command, on_cpu=not here))


def _say_start(recipe: Any, command: list[str], *, resume: bool, checked: bool) -> None:
    from gardo.distributed.saved import committed, step_of

    folder, there = recipe.run_folder, ""
    saved = committed(recipe.checkpoint_folder) if resume else []
    if saved:
        there = f"goes on after step {step_of(saved[0])}"
    elif folder.exists():
        there = "what lies there now would be moved aside"
    print(f"run      {folder}: {there or 'new'}")
    print(f"command  {shlex.join(command)}")
    if not checked:
        print("its GPUs, and endpoints of its rewards, are not looked for from here")
    print("nothing was started (--dry-run)")


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

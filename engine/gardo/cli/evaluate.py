"""`gardo eval`: a model on a suite, with intervals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gardo import lazily
from gardo.cli.common import refuse

SuiteSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE ...", help="override fields of the suite"),
]


def eval_(
    suite: Annotated[Path, typer.Option(help="what is asked and who judges: suites/README.md")],
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
    out: Annotated[
        Path | None, typer.Option(help="where to write; evaluations/SUITE/NAME if left out")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="the folder of another evaluation on this suite, to compare with"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="ranks: GPUs, or CPU processes where there is none; 1")
    ] = None,
    set_: SuiteSetOption = None,
) -> None:
    """Evaluate a model on a suite, with intervals: result.json, result.md, result.html, grid.png.

    All models get the same noise. The same command again goes on where it was cut; a finished one
    draws nothing again, with --against only compares.

    gardo eval builtin:flux --suite suites/tiny.yaml

    gardo eval --run runs/one --suite suites/tiny.yaml --against evaluations/tiny/builtin-flux
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _refuse_early(suite, set_)
    from gardo import launch
    from gardo.evaluate import arguments_of, check_here, main, task
    from gardo.nvidia import gpus_here
    from gardo.recipe_errors import RecipeError

    here = gpus_here()
    try:
        where = launch.places(gpus=gpus, hostfile=None, include=None, here=here)
        options: dict[str, Any] = {"lora": lora, "run": run, "step": step, "out": out}
        options["against"] = against
        asked = task(model=model, suite=suite, average=ema, sets=set_ or [], **options)
        check_here(asked)
        # the run may go on meanwhile: all ranks take the checkpoint that is the newest now
        options["step"] = asked.contender.run.step if asked.contender.run else None
        arguments = arguments_of(model=model, suite=suite, average=ema, sets=set_ or [], **options)
        command = launch.command(where, arguments, master=None, port=None, launched=True,
                                 module="gardo.evaluate")  # fmt: skip
    except (RecipeError, ValueError) as error:
        refuse(error)
    if where.ranks == 1:
        raise typer.Exit(main(arguments))
    raise typer.Exit(launch.run(where, command, on_cpu=not here))


def _refuse_early(suite: Path, overrides: list[str] | None) -> None:
    """A suite that is none, before torch is loaded."""
    from gardo.recipe_errors import RecipeError
    from gardo.suite import load_suite

    try:
        load_suite(suite, overrides or [])
    except RecipeError as error:
        refuse(error)
    lazily.load_now()

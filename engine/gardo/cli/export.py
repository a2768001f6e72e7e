"""`gardo export` and `gardo import`: weights for other programs, and theirs for recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gardo import lazily
from gardo.cli.common import refuse


def export(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="of a LoRA: diffusers, peft, kohya; of all weights: transformer, pipeline",
        ),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="the average of the weights (train.ema)")
    ] = False,
    step: Annotated[
        int | None, typer.Option(help="which checkpoint; the newest if left out")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where to write; RUN/export if left out")] = None,
    shard_size: Annotated[str, typer.Option(help="most that a file of all weights holds")] = "5GB",
    universal: Annotated[
        bool,
        typer.Option("--universal", help="DeepSpeed's universal checkpoint instead, with moments"),
    ] = False,
) -> None:
    """Write a run's trained weights for other programs, and a model card: docs/files.md.

    gardo export runs/tiny-flux-gardo

    gardo export runs/tiny-flux-gardo --format kohya --step 20 --out my-lora
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _refuse_early(run)
    from gardo.export import export_run, export_universal
    from gardo.loading import quiet_libraries
    from gardo.planner.sizes import bytes_of
    from gardo.recipe_errors import RecipeError

    quiet_libraries()
    try:
        if universal and (format_ or ema):
            raise RecipeError("--universal: a format of its own, of the live weights; leave out "
                              "--format and --ema")  # fmt: skip
        if universal:
            print(export_universal(run, out=out, step=step))
        else:
            shard = bytes_of(shard_size)
            print(export_run(run, format=format_, average=ema, out=out, step=step,
                             shard_bytes=shard))  # fmt: skip
    except (RecipeError, ValueError) as error:
        refuse(error)


def _refuse_early(run: Path) -> None:
    """A folder of no run, before torch is loaded."""
    from gardo.distributed.saved import no_run

    if problem := no_run(run):
        refuse(problem)
    lazily.load_now()


def import_(
    lora: Annotated[Path, typer.Argument(help="a LoRA: PEFT's folder, or a file of diffusers")],
    out: Annotated[Path, typer.Option(help="the folder to write to")],
) -> None:
    """Make another program's LoRA a diffusers LoRA with all that a recipe must say of it.

    gardo import my-lora --out imported
    """
    import yaml

    from gardo.files import made_folder
    from gardo.policies.lora_files import DIFFUSERS_FILE, lora_config, open_lora, save_diffusers

    try:
        found = open_lora(lora)
    except ValueError as error:
        refuse(error)
    if (out / DIFFUSERS_FILE).resolve() == found.path.resolve():
        refuse(f"--out {out}: {found.path} is read from there; give another folder")
    said: dict[str, Any] = {
        "rank": found.rank,
        "alpha": found.alpha,
        "targets": list(found.targets),
    }
    try:
        file = save_diffusers(found.read(), lora_config(**said), made_folder(out))
    except ValueError as error:
        refuse(error)
    weights = {"kind": "lora", "path": str(file.absolute()), **said}
    print(yaml.safe_dump({"train": {"weights": weights}}, sort_keys=False), end="")

"""`gardo doctor`: what this machine can run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gardo.cli.common import SetOption, checked


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="a recipe whose settings are to be used")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Say what this machine can run, and which kernels; exit 1 where something is missing."""
    from gardo.doctor import examine

    kernels = checked(recipe, set_).kernels if recipe else "auto"
    worst = 0
    for finding in examine(kernels):
        worst = max(worst, finding.state == "problem")
        print(f"{finding.state:8} {finding.name:22} {finding.detail}", flush=True)
    raise typer.Exit(int(worst))

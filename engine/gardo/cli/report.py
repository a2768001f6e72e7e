"""`gardo report`: the page of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gardo.cli.common import refuse


def report(run: Annotated[Path, typer.Argument(help="the folder of a run")]) -> None:
    """Write a run's report.html again from its metrics.jsonl.

    gardo report runs/tiny-flux-gardo
    """
    if not (run / "metrics.jsonl").is_file():
        refuse(f"{run}: no metrics.jsonl; name the folder of a run, such as runs/tiny-flux-gardo")
    from gardo.report.html import write_report
    from gardo.report.metrics_log import missing

    try:
        written = write_report(run)
        for trouble in missing(run / "metrics.jsonl"):
            print(trouble, file=sys.stderr)
        print(written)
    except (OSError, ValueError) as error:
        refuse(f"{run}: no report can be made of it: {error}")

"""`gardo compare`: several runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gardo.cli.common import JsonOption, refuse


def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; the first is the baseline")],
    out: Annotated[Path, typer.Option(help="the page; written over")] = Path("compare.html"),
    as_json: JsonOption = False,
) -> None:
    """Write a page of several runs: recipes' differences, curves, pictures, rewards by prompt.

    gardo compare runs/tiny-flux-grpo runs/tiny-flux-gardo

    gardo compare runs/a runs/b runs/c --out abc.html

    gardo compare runs/a runs/b --json > compared.json
    """
    from gardo.compare import as_data, read, write_page

    try:
        found = read(runs)
        if as_json:
            print(json.dumps(as_data(found), indent=2, allow_nan=False))
            return
        write_page(found, out)
    except (OSError, ValueError) as error:
        refuse(error)
    width = max(len(one.name) for one in found)
    for one in found:
        print(f"{one.name:{width}}  {one.verdict.conclusion}")
    print(out)

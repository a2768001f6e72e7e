"""`gardo selftest`: what can go wrong, done to small runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gardo.cli.common import refuse


def selftest(
    subject: Annotated[str, typer.Argument(help="reliability")] = "reliability",
    quick: Annotated[bool, typer.Option("--quick", help="the cases that take seconds")] = False,
    only: Annotated[str, typer.Option(help="the cases whose name has this in it")] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the table and run nothing")
    ] = False,
) -> None:
    """Do to small runs what can go wrong with real ones; exit 1 where something does not hold.

    gardo selftest reliability --quick
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.ending import hear_signals
    from gardo.selftest import reliability

    hear_signals()
    if subject != "reliability":
        refuse(f"{subject}: there is no such self-test; give reliability")
    if markdown:
        print(reliability.markdown())
        return
    cases = reliability.chosen(quick=quick, only=only)
    if not cases:
        refuse(f"--only {only}: no case has that in its name; --markdown shows them")
    broken = 0
    for subject_, of in cases.items():
        print(f"{subject_}", flush=True)
        for outcome in reliability.tried(of):
            case, broken = outcome.case, broken + bool(outcome.problem)
            state = "BROKEN" if outcome.problem else "holds"
            print(f"  {state:7} {outcome.seconds:6.1f} s  {case.name:28} {case.holds}", flush=True)
            if outcome.problem:
                print(f"          {outcome.problem}", flush=True)
    raise typer.Exit(int(broken > 0))

"""docs/reference/cli.md: every command with its arguments and options."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import typer

from gardo.cli import app
from gardo.cli.common import EXIT_CODES

from .markdown import MADE, code, paragraph, prose, table

INTRO = f"""{MADE}

# The command line

In a checkout without an environment of its own, write `./run` for `gardo`. `gardo COMMAND --help`
says the same as this page.
"""
COMPLETION = """`gardo --install-completion` has the shell complete commands and options with
the tab key; `--show-completion` prints what it would add to the shell's configuration.
"""


def page() -> str:
    codes = table(("exit code", "meaning"), EXIT_CODES.items())
    return (
        "\n".join(
            [INTRO, *codes, COMPLETION, *commands(typer.main.get_command(app), "gardo")]
        ).rstrip()
        + "\n"
    )


def commands(command: Any, name: str) -> Iterator[str]:
    """A command, or of a group each of its commands."""
    if hasattr(command, "commands"):
        for inner, found in command.commands.items():
            yield from commands(found, f"{name} {inner}")
        return
    yield from (f"## {name}", "")
    for part in inspect.cleandoc(command.help or "").split("\n\n"):
        example = part.startswith("gardo ")
        yield from (("```", part, "```", "") if example else (paragraph(part), ""))
    kinds = get_type_hints(command.callback)
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name in kinds]
    rows = [(spelled(p, kinds[p.name]), default_of(p), prose(p.help or "")) for p in shown]
    if rows:
        yield from table(("option", "default", "meaning"), rows)


def spelled(parameter: Any, kind: Any) -> str:
    if parameter.param_type_name == "argument":
        return code((parameter.metavar or parameter.name).upper())
    options = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return code(options) if parameter.is_flag else code(f"{options} {value_of(parameter, kind)}")


def value_of(parameter: Any, kind: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    inner = [k for k in (*get_args(kind), kind) if k is not NoneType]
    return {int: "N", float: "X", Path: "PATH"}.get(inner[0], "TEXT")


def default_of(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    value = parameter.default
    return "" if value in (None, False, ()) or callable(value) else code(str(value))

"""Texts of somebody else's in Markdown, where they are texts and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence

SPECIAL = re.compile(r"([\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
OPENING = re.compile(r"^(\d*)([#+\->.)])")  # of a heading, a list, a quotation


def escape(text: object) -> str:
    """Inside a line: nothing in it opens a tag, a link, an emphasis or another line."""
    said = " ".join(str(text).split())
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), ("://", ":&#47;/")):
        said = said.replace(sign, entity)
    return SPECIAL.sub(r"\\\1", said)


def escape_line(text: object) -> str:
    """As `escape`, where a line begins: nor does it open a block."""
    return OPENING.sub(r"\1\\\2", escape(text))


def code(text: object) -> str:
    """A code span, also of a text with backticks."""
    said = " ".join(str(text).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", said)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{said}{space}{ticks}" if said else ""


def fenced(text: str, language: str) -> str:
    """A block of code, whatever is in it."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)

"""Tables that GitHub and the site show alike."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

MADE = "<!-- made by docs/make_reference.py; do not edit -->"


def code(value: str) -> str:
    return f"`{value}`"


def prose(text: str) -> str:
    """Text of a docstring in one line, what Markdown would take as its own marked."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    marks = r"[*<]|(?<!\w)_|_(?!\w)"
    plain = [re.sub(marks, r"\\\g<0>", p) if i % 2 == 0 else p for i, p in enumerate(parts)]
    return "".join(plain)


def paragraph(text: str) -> str:
    return textwrap.fill(prose(text), 120, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in cells]
    return [*(f"| {line} |" for line in lines), ""]


def slug(heading: str) -> str:
    """GitHub's anchor of a heading that no other on the page equals."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

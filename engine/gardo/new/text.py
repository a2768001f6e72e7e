"""A recipe's values as YAML, each field with what the schema says of it as its comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from gardo.recipe import Recipe, reward_plugin
from gardo.recipe_text import write_yaml
from gardo.settings import described

WIDTH = 100


def commented(raw: Mapping[str, Any], recipe: Recipe, command: str, head: str) -> str:
    """`raw` are the values, `recipe` what they were checked to be; `command` and `head` are said
    above, the command on a line of its own."""
    lines = ["# Written by", f"#     {command}", *_comment(head, "")]
    for name, section in raw.items():
        lines += ["", *_comment(_said(recipe, name), ""), f"{name}:"]
        lines += _rewards(section, recipe) if name == "rewards" else _fields(
            section, getattr(recipe, name), "  "
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _fields(section: Mapping[str, Any], checked: Any, indent: str) -> Iterator[str]:
    for name, value in section.items():
        said, inner = _said(checked, name), getattr(checked, name, None)
        if isinstance(value, dict) and isinstance(inner, BaseModel):
            yield from _line(f"{indent}{name}:", said, indent)
            yield from _fields(value, inner, indent + "  ")
        else:
            yield from _line(f"{indent}{name}: {_plain(value)}", said, indent)


def _rewards(section: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    for name, value in section.items():
        about = reward_plugin(recipe.rewards[name]).about
        yield from _line(f"  {name}: {_plain(value)}", about.formula if about else "", "  ")


def _line(code: str, comment: str, indent: str) -> Iterator[str]:
    """With its comment behind it, or above where that is too long."""
    if not comment:
        yield code
    elif len(code) + len(comment) + 4 <= WIDTH:
        yield f"{code}  # {comment}"
    else:
        yield from _comment(comment, indent)
        yield code


def _comment(text: str, indent: str) -> Iterator[str]:
    for paragraph in text.splitlines():
        yield from textwrap.wrap(paragraph, WIDTH, initial_indent=f"{indent}# ",
                                 subsequent_indent=f"{indent}# ", break_long_words=False,
                                 break_on_hyphens=False)  # fmt: skip


def _said(checked: Any, name: str) -> str:
    return (described(type(checked), name) or "") if isinstance(checked, BaseModel) else ""


def _plain(value: Any) -> str:
    """On one line, as YAML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_plain(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    text = write_yaml(value).removesuffix("\n").removesuffix("\n...").strip()
    return f'"{text}"' if isinstance(value, str) and ":" in text and text[0] not in "'\"" else text

"""Every built-in reward in a row: `gardo rewards list`, and the table of docs/rewards.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gardo import plugins
from gardo.rewards._files import Files
from gardo.rewards.base import RewardSettings

COLUMNS = (
    "reward", "formula", "usual values", "gradient", "default weights", "their licence", "verified",
)  # fmt: skip


def rows() -> Iterator[tuple[str, ...]]:
    for name in plugins.names("gardo.rewards"):
        plugin = plugins.resolve("gardo.rewards", name)
        about = plugin.about
        weights = ", ".join(default_weights(plugin.Settings)) or "-"
        gradient = "yes" if plugin.differentiable else "-"
        yield name, about.formula, about.scale, gradient, weights, about.licence, about.verified


def default_weights(settings: Any) -> list[str]:
    """The hub ids that its fields name by default."""
    found = [
        about.default
        for about in settings.model_fields.values()
        if any(isinstance(mark, Files) for mark in about.metadata)
    ]
    return list(dict.fromkeys(path for path in found if isinstance(path, str)))


def used_weights(settings: RewardSettings) -> Iterator[tuple[str, str | None]]:
    """The models that a reward's settings name, hub ids or folders, with their revisions; or what
    an endpoint calls its own."""
    if model := getattr(settings, "model", None):
        yield str(model), None
    for field, about in type(settings).model_fields.items():
        if any(isinstance(mark, Files) for mark in about.metadata) and getattr(settings, field):
            name = "revision" if field == "path" else f"{field}_revision"
            yield getattr(settings, field), getattr(settings, name, None)


def as_markdown() -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows()]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def as_data() -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows()]


def as_text() -> str:
    blocks = []
    for name, *rest in rows():
        about = zip(COLUMNS[1:], rest, strict=True)
        blocks.append("\n".join([name, *(f"    {what:16} {said}" for what, said in about)]))
    return "\n".join(blocks)

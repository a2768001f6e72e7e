"""A run's folder: begun, or gone on with by a recipe that may differ from the one it has."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from gardo import config
from gardo.files import write_atomically
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.report.metrics_log import MetricsLog
from gardo.report.progress import Progress


def keep_old_run(folder: Path) -> Path | None:
    """Moves an earlier run's folder out of the way, so that nothing is lost; returns its place."""
    if not folder.exists():
        return None
    number = next(
        n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists()
    )
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def open_log(recipe: Recipe, progress: Progress, first_step: int) -> MetricsLog:
    """The run's folder with its resolved recipe and its log, new or from `first_step` on."""
    folder = recipe.run_folder
    if first_step:
        progress.message(f"resumed after step {first_step}")
    elif moved := keep_old_run(folder):
        progress.message(f"the earlier run of this name is now {moved}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "recipe.yaml", config.dump(recipe).encode())
    return MetricsLog(folder / "metrics.jsonl", from_step=first_step + 1 if first_step else None)


# of a run that has started, with all that is inside
FIXED = re.compile(
    r"(model\.(?!(encoders|attention|block_kernels)$)|train\.(weights(?!\.folded$)|ema|optimizer\.name)|algorithm(\.base)*\.name).*"
)


def check_changes(recipe: Recipe, source: str) -> list[str]:
    """How the recipe differs from the one that the run was started with, a line a field.

    RecipeError where a checkpoint of it cannot be used with the change.
    """
    path = recipe.run_folder / "recipe.yaml"
    if not path.is_file():
        return []
    old = flat(config.read_yaml(path.read_text(encoding="utf-8"), str(path)))
    new = flat(recipe.model_dump(mode="json"))
    lines = []
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            change = f"{field}: {old.get(field)} -> {new.get(field)}"
            if FIXED.fullmatch(field):
                raise RecipeError(
                    f"{source}: {change}: the checkpoints in {recipe.run_folder} were made with "
                    "the old value; take it back, or start another run with run.name"
                )
            lines.append(change)
    return lines


def flat(section: Any, name: str = "") -> dict[str, Any]:
    """The values of a section by the names of their fields: `train.optimizer.lr`."""
    if not isinstance(section, dict):
        return {name: section}
    parts = (flat(value, f"{name}.{key}" if name else key) for key, value in section.items())
    return {field: value for part in parts for field, value in part.items()}

"""A run's folder: begun, or gone on with by a recipe that may differ from the one it has."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gardo import config
from gardo.distributed.base import Ranks, gather_text
from gardo.files import write_atomically
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.report.metrics_log import MetricsLog
from gardo.report.progress import Progress
from gardo.run_lock import RunLock


def own_folder(lock: RunLock, ranks: Ranks, source: str) -> str:
    """Takes the run for rank 0; returns what is to be said of a lock that was left behind.

    RecipeError on every rank where another process has it.
    """
    note = problem = ""
    if ranks.rank == 0:
        try:
            note = lock.take()
        except (OSError, ValueError) as error:
            problem = str(error)
    if said := gather_text(ranks, problem)[0]:
        raise RecipeError(f"{source}: run.name: {said}")
    return note


def run_id(folder: Path) -> str | None:
    """What tells this run from every other, in its checkpoints too; None of a run from before
    there were such. RecipeError where it cannot be read."""
    file = folder / "run.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(
            f"{file}: the run's id cannot be read ({error}); remove the file: the run then takes "
            "the id of its newest checkpoint"
        ) from error


def keep_id(folder: Path, known: str | None) -> str:
    """The run's id, as it is known or a new one, kept in its folder."""
    if known and run_id(folder) == known:
        return known
    facts = {
        "id": known or secrets.token_hex(8),
        "started": datetime.now(UTC).isoformat(" ", "seconds"),
    }
    write_atomically(folder / "run.json", json.dumps(facts, indent=1).encode())
    return facts["id"]


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
        return [f"{path} is not there: what else has changed is not known"]
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

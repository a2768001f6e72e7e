"""What every full-size recipe takes of which GPUs: the table of recipes/README.md, by `gardo plan`.

    ./run bench plan [RECIPE ...]

Each recipe as it stands on 8 GPUs of 80 GB; those that train a LoRA also on 1 of 80 GB and on 1 of
24 GB, with the settings that the plan advises there. Nothing is measured and nothing is downloaded.
Writes benchmarks/results/plan.csv and the table; of recipes that are named, their rows alone.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gardo.config import load
from gardo.loading import quiet_libraries
from gardo.planner import geometry
from gardo.planner.advice import advise, changed
from gardo.planner.memory import Counted
from gardo.planner.page import gigabytes
from gardo.planner.shadow import Shadow
from gardo.planner.time import seconds
from gardo.recipe import Recipe
from pages import fill, revision

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "recipes" / "README.md", ROOT / "benchmarks" / "results" / "plan.csv"
MACHINES = ((8, 80), (1, 80), (1, 24))  # GPUs, GB of each


def full_size() -> list[Path]:
    return sorted(p for p in (ROOT / "recipes").glob("*.yaml") if not p.name.startswith("tiny_"))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    recipe = load(path, prompts=False)
    counted = Counted(Shadow(recipe))
    for gpus, room in MACHINES:
        if gpus == MACHINES[0][0] or recipe.train.weights.kind == "lora":
            yield {"recipe": path.name, "trains": trained(recipe), "gpus": gpus, "gb": room,
                   **planned(recipe, counted, gpus, room), "revision": revision()}  # fmt: skip


def trained(recipe: Recipe) -> str:
    weights = recipe.train.weights
    return f"LoRA {weights.rank}" if weights.kind == "lora" else "everything"


def planned(recipe: Recipe, counted: Counted, gpus: int, room: int) -> dict[str, Any]:
    found = advise(counted, recipe, gpus, room * 10**9)
    if found is None:
        return {"peak": "", "phase": "", "settings": "does not fit", "hours": ""}
    changes, memory = found
    here = recipe
    for change in changes:
        here = changed(here, change)
    took = seconds(here, counted.shadow, geometry(here, rank=0, world=gpus), gpus, nodes=1)
    return {
        "peak": gigabytes(memory.peak),
        "phase": memory.peak_phase.name,
        "settings": " ".join(change.on(recipe) for change in changes),
        "hours": f"{took.total * recipe.run.steps / 3600:.0f}",
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| recipe | trains | GPUs | peak, GB | in phase | with |", "|---|---|---|---|---|---|"]
    for row in rows:
        settings = f"`{row['settings']}`" if row["settings"].startswith("--") else row["settings"]
        lines.append(
            f"| [{row['recipe']}]({row['recipe']}) | {row['trains']} | {row['gpus']} x {row['gb']} "
            f"GB | {row['peak']} | {row['phase']} | {settings or 'as it stands'} |"
        )
    return "\n".join([
        *lines,
        "",
        "Counted, not measured (`./run bench plan`; `gardo plan RECIPE` says what of), with "
        "1 GB assumed for CUDA and NCCL, and for fragments 5 % of what comes and goes.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("recipes", nargs="*", type=Path, help="all of full size if left out")
    options = parser.parse_args()
    quiet_libraries()
    rows = []
    for path in options.recipes or full_size():
        for row in rows_of(path):
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if options.recipes:  # the rows of the others stay
        with open(RESULTS, newline="", encoding="utf-8") as file:
            measured = {row["recipe"] for row in rows}
            rows += [row for row in csv.DictReader(file) if row["recipe"] not in measured]
        rows.sort(key=lambda row: row["recipe"])
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    fill(PAGE, "plan", table(rows))


if __name__ == "__main__":
    main()

"""What checkpoints cost the demo: seconds of a save against seconds of an iteration.

    ./run bench checkpoint [--steps 8] [--recipe recipes/tiny_flux_gardo.yaml]

Trains the recipe on two ranks and saves after every iteration, once writing in the background and
once not; the seconds are those that training stood still, as metrics.jsonl has them. Writes
benchmarks/results/checkpoint.csv and its line in docs/distributed.md.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from gardo.config import load
from gardo.report.metrics_log import read_metrics
from pages import ROOT, fill, revision

RESULTS = ROOT / "benchmarks" / "results" / "checkpoint.csv"


def measure(recipe: Path, steps: int, background: bool) -> dict[str, Any]:
    """One run's means; the first iteration, which warms up, is left out."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.folder": folder, "run.steps": steps, "checkpoint.every": 1,
            "checkpoint.background": background, "evaluate.every": steps,
        }  # fmt: skip
        sets = [part for n, v in settings.items() for part in ("--set", f"{n}={v}")]
        command = [sys.executable, "-m", "gardo.cli", "train", str(recipe), "--gpus", "2", *sets]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        (run,) = Path(folder).iterdir()
        records = read_metrics(run / "metrics.jsonl")
        saved = next((run / "checkpoints").glob(f"step-{steps:06d}"))
        size = sum(file.stat().st_size for file in saved.iterdir())
    # a save's seconds stand in the record of the iteration after it
    seconds = [r["seconds"] for r in records if r["kind"] == "step"][1:]
    return {
        "save_seconds": mean(s["checkpoint"] for s in seconds),
        "iteration_seconds": mean(sum(s.values()) - s["checkpoint"] for s in seconds),
        "bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny_flux_gardo.yaml")
    options = parser.parse_args()
    every = load(options.recipe).checkpoint.every
    rows = []
    for background in (True, False):
        seen = measure(options.recipe, options.steps, background)
        rows.append({
            "recipe": options.recipe.name, "background": background,
            "bytes": seen["bytes"], "save_seconds": round(seen["save_seconds"], 4),
            "iteration_seconds": round(seen["iteration_seconds"], 3),
            "percent_if_each": round(100 * seen["save_seconds"] / seen["iteration_seconds"], 2),
            "percent": round(100 * seen["save_seconds"] / seen["iteration_seconds"] / every, 3),
            "every": every, "torch": torch.__version__, "machine": platform.machine(),
            "revision": revision(),
        })  # fmt: skip
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    behind, at_once = rows
    text = (
        f"On the demo ({at_once['bytes'] / 1e6:.1f} MB a checkpoint, two CPU ranks) training "
        f"stands still for {1000 * behind['save_seconds']:.0f} ms a save, "
        f"{1000 * at_once['save_seconds']:.0f} ms with `background: false`: "
        f"{behind['percent_if_each']} % and {at_once['percent_if_each']} % of the time if it saved "
        f"after every iteration, a {every}th of that with the recipe's `every: {every}` (`./run "
        f"bench checkpoint`, revision {at_once['revision']})."
    )
    fill(ROOT / "docs" / "distributed.md", "checkpoint", text)


if __name__ == "__main__":
    main()

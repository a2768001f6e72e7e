"""No KL, uniform KL and GARDO on the built-in tiny Flux, same budget, several seeds.

    ./run study                 100 iterations, seeds 42, 7 and 8, a run at a time on two ranks
    ./run study --jobs 2        two runs at a time, each one rank of one thread

Trains the three recipes with every seed and writes tiny_regularisers.{png,csv,md} to --out, by
default benchmarks/results; README.md then shows the tables between its `study` marks, which this
script fills. Runs are kept in --runs: a finished one is taken as it is, one that was cut goes on
from its newest checkpoint, so the study may be stopped and started again.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import signal
from importlib.metadata import version
from pathlib import Path

import torch

from gardo.config import load
from pages import ROOT, fill
from study.figure import picture
from study.runs import ARMS, Run, Study, train
from study.tables import FIELDS, report, rows

RESULTS = ROOT / "benchmarks" / "results"


def demo_steps() -> int:
    """The demo's iterations."""
    return load(ROOT / "recipes" / "tiny_flux_gardo.yaml").run.steps


def versions() -> str:
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"deepspeed {version('deepspeed')}, diffusers {version('diffusers')}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "./run study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="iterations of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 7, 8])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 1: on two ranks")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: exit(128 + number))
    options = arguments()
    steps, out = options.steps, options.out.resolve()
    runs = [Run(arm, seed, options.runs.resolve()) for seed in options.seeds for arm in ARMS]
    train(runs, steps, options.set, options.jobs)

    study: Study = {arm: {} for arm in ARMS}
    for run in runs:
        study[run.arm][run.seed] = run.evaluations()
    seed, machine = options.seeds[0], versions()
    out.mkdir(parents=True, exist_ok=True)
    exports = {run.arm: run.folder / "export" for run in runs if run.seed == seed}
    picture(study, exports, seed, steps, out / "tiny_regularisers.png")
    with (out / "tiny_regularisers.csv").open("w", newline="", encoding="utf-8") as file:
        trained_at = {(run.arm, run.seed): " ".join(run.revisions()) for run in runs}
        csv.writer(file).writerows([FIELDS, *rows(study, trained_at, machine)])
    revisions = list(dict.fromkeys(r for run in runs for r in run.revisions()))
    text = report(study, steps, demo_steps(), revisions, machine)
    (out / "tiny_regularisers.md").write_text(text + "\n", encoding="utf-8")
    if out == RESULTS.resolve():
        fill(ROOT / "README.md", "study", text)
    print(text)


if __name__ == "__main__":
    main()

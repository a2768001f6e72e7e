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
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gardo.config import load
from gardo.report.metrics_log import Record
from pages import fill
from study_figure import picture
from study_runs import ARMS, ROOT, Run, Study, train

RESULTS = ROOT / "benchmarks" / "results"
PROXY, HELD_OUT, PATCHES = "tiny_count", "tiny_fidelity", "tiny_patches"
FIELDS = (
    *("arm", "seed", "iteration", "measure", "mean", "low", "high"),
    *("change", "change_low", "change_high", "revision", "machine"),
)


def demo_steps() -> int:
    """The demo's iterations."""
    return load(ROOT / "recipes" / "tiny_flux_gardo.yaml").run.steps


# ---- the tables ----------------------------------------------------------------------------------


def interval(values: Mapping[str, float], sign: str = "") -> str:
    """Mean and interval over prompts, in percent."""
    mean, low, high = (f"{100 * values[end]:{sign}.1f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def over_seeds(values: Sequence[float], form: str) -> str:
    """Mean, least and greatest: three seeds give no interval."""
    return f"{fmean(values):{form}} ({min(values):{form}}, {max(values):{form}})"


def at(study: Study, step: int) -> dict[str, dict[int, Record]]:
    """{arm: {seed: the evaluation after `step` iterations}}."""
    return {
        arm: {seed: next(r for r in records if r["step"] == step) for seed, records in runs.items()}
        for arm, runs in study.items()
    }


def change(record: Record, measure: str) -> float:
    """In percent."""
    return 100 * record["change"][measure]["mean"]


def table(study: Study, steps: int) -> str:
    """Every run after `steps` iterations, the start of each seed before, an arm's mean last."""

    def row(title: str, seed: int, record: Record, *, changed: bool = True) -> str:
        cells: list[Any] = [title, seed]
        for measure in (PROXY, HELD_OUT):
            cells.append(interval(record["rewards"][measure]))
            cells.append(interval(record["change"][measure], "+") if changed else "")
        cells.append(interval(record["change"][PATCHES], "+") if changed else "")
        return line([*cells, f"{record['diversity']['layout']:.2f}"])

    heads = ["proxy, %", "change", "held-out, %", "change", "patches, change", "layout entropy"]
    lines = [line([f"after {steps} iterations", "seed", *heads]), "|---" * 8 + "|"]
    lines += [
        row("start", seed, record, changed=False)
        for seed, record in next(iter(at(study, 0).values())).items()
    ]
    for arm, by_seed in at(study, steps).items():
        title, records = ARMS[arm][0], by_seed.values()
        lines += [row(title, seed, record) for seed, record in by_seed.items()]
        proxy, held_out, patches = (
            over_seeds([change(r, m) for r in records], "+.1f") for m in (PROXY, HELD_OUT, PATCHES)
        )
        layout = over_seeds([r["diversity"]["layout"] for r in records], ".2f")
        cells = [f"**{title}**", "all", "", f"**{proxy}**", "", f"**{held_out}**", patches, layout]
        lines.append(line(cells))
    return "\n".join(lines)


def demo_table(study: Study, steps: int) -> str:
    """The changes after the demo's iterations: a row an arm and measure, a column a seed."""
    seeds = list(next(iter(study.values())))
    heads = [f"after {steps} iterations", "change of", *(f"seed {s}" for s in seeds), "all"]
    lines = [line(heads), "|---" * len(heads) + "|"]
    for arm, by_seed in at(study, steps).items():
        for name, measure in (("proxy, %", PROXY), ("held-out, %", HELD_OUT)):
            cells = [interval(by_seed[seed]["change"][measure], "+") for seed in seeds]
            mean = over_seeds([change(by_seed[seed], measure) for seed in seeds], "+.1f")
            lines.append(line([ARMS[arm][0], name, *cells, f"**{mean}**"]))
    return "\n".join(lines)


def line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def note(record: Record, revisions: Sequence[str], machine: str) -> str:
    """What the tables' numbers are, and where and at which revisions the runs were trained."""
    plural = "s" if len(revisions) > 1 else ""
    return (
        f"Each run: {record['image_count']} images of {record['prompt_count']} prompts, noise "
        f"fixed by its seed. [Brackets]: 95 % intervals over prompts, changes paired with the same "
        f"seed's start. (Parentheses): least and greatest of the seeds, no interval. Patches: the "
        f"score for the right number of connected patches, which nothing optimises, in %. Entropy "
        f"in nats. Trained at revision{plural} {', '.join(revisions)}; {machine}."
    )


def report(study: Study, steps: int, demo: int, revisions: Sequence[str], machine: str) -> str:
    """The tables and their note; the demo's only where it is another point of the same runs."""
    first = next(iter(next(iter(study.values())).values()))
    shared = demo != steps and any(r["step"] == demo for r in first)
    tables = [table(study, steps), *([demo_table(study, demo)] if shared else [])]
    return "\n\n".join([*tables, note(first[-1], revisions, machine)])


# ---- the CSV -------------------------------------------------------------------------------------


def rows(study: Study, revisions: Mapping[tuple[str, int], str], machine: str) -> list[list[Any]]:
    """A row an arm, seed, iteration and measure, in the order of FIELDS."""
    ends = ("mean", "low", "high")
    found = []
    for arm, by_seed in study.items():
        for seed, records in by_seed.items():
            where = [revisions[arm, seed], machine]
            for r in records:
                run = [ARMS[arm][0], seed, r["step"]]
                for measure, values in r["rewards"].items():
                    changed = r["change"][measure]
                    numbers = [values[e] for e in ends] + [changed[e] for e in ends]
                    found.append([*run, measure, *numbers, *where])
                for measure, value in r["diversity"].items():
                    found.append([*run, f"entropy {measure}", value, *[""] * 5, *where])
    return found


def versions() -> str:
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"deepspeed {version('deepspeed')}, diffusers {version('diffusers')}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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

"""The study's tables and the rows of its CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from gardo.report.metrics_log import Record
from study.runs import ARMS, Study

PROXY, HELD_OUT, PATCHES = "tiny_count", "tiny_fidelity", "tiny_patches"
FIELDS = (
    *("arm", "seed", "iteration", "measure", "mean", "low", "high"),
    *("change", "change_low", "change_high", "revision", "machine"),
)


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

"""The toy's tables, from its CSV: means of all arms, paired differences, and the paper's claims."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gardo.evaluation.statistics import Interval, bootstrap_mean, paired_change
from toy.seeds import START
from toy.world import Toy

OURS = "gardo"
MEASURES = {  # name: (title, digits)
    "proxy": ("reward (proxy)", 2),
    "true": ("true reward", 2),
    "modes": ("modes covered", 1),
    "centre_share": ("share at the centre", 3),
    "spurious_share": ("share in the spurious region", 3),
}
FIELDS = ("arm", "seed", *MEASURES, "cpu_seconds", "revision", "torch", "python")


@dataclass(frozen=True)
class Comparison:
    """The CSV's values: {arm: {measure: fp64 [seeds]}}, seeds in the same order in every arm."""

    values: dict[str, dict[str, Tensor]]

    @classmethod
    def read(cls, path: Path) -> Comparison:
        with path.open(newline="", encoding="utf-8") as file:
            return cls.of(csv.DictReader(file))

    @classmethod
    def of(cls, found: Iterable[dict[str, str]]) -> Comparison:
        """Of a CSV's rows, one for each arm and seed."""
        by_arm: dict[str, list[dict[str, str]]] = {}
        for row in found:
            by_arm.setdefault(row["arm"], []).append(row)
        values = {}
        for arm, rows in by_arm.items():
            rows.sort(key=lambda row: int(row["seed"]))
            values[arm] = {
                name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
                for name in MEASURES
            }
        return cls(values)

    def mean(self, arm: str, measure: str) -> Interval:
        return bootstrap_mean(self.values[arm][measure])

    def change(self, before: str, after: str, measure: str) -> Interval:
        """`after` - `before`, paired by seed."""
        return paired_change(self.values[before][measure], self.values[after][measure])

    def hacked(self, arm: str) -> int:
        """In how many seeds most samples lie in the spurious region."""
        return int((self.values[arm]["spurious_share"] > 0.5).sum())

    def centre_covered(self, arm: str, share: float) -> int:
        """In how many seeds the centre has at least this share."""
        return int((self.values[arm]["centre_share"] >= share).sum())


def shown(interval: Interval, digits: int, sign: str = "") -> str:
    mean, low, high = (
        f"{v:{sign}.{digits}f}" for v in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [{low}, {high}]"


def titles(toy: Toy) -> dict[str, str]:
    return {START: "pre-trained", **{name: arm.title for name, arm in toy.arms.items()}}


def table(comparison: Comparison, toy: Toy) -> str:
    """Means of all arms, then GARDO's paired differences."""
    header = " | ".join(title for title, _ in MEASURES.values())
    lines = [f"| | {header} | seeds hacked |", "|---" * (len(MEASURES) + 2) + "|"]
    for arm, title in titles(toy).items():
        cells = [shown(comparison.mean(arm, m), d) for m, (_, d) in MEASURES.items()]
        hacked = f"{comparison.hacked(arm)} of {toy.seeds}"
        lines.append(f"| {title} | {' | '.join(cells)} | {hacked} |")
    for arm, title in titles(toy).items():
        if arm != OURS:
            cells = [
                shown(comparison.change(arm, OURS, m), d, "+") for m, (_, d) in MEASURES.items()
            ]
            lines.append(f"| *GARDO − {title}* | {' | '.join(cells)} | |")
    return "\n".join(lines)


def claims(comparison: Comparison, toy: Toy) -> str:
    """The paper's four claims, each with what was measured and whether that bears it out.

    The limits of the third column were written down before the first run of diversity or GARDO.
    """
    places = len(toy.layout.rewarded) + 1
    most, few = 0.9 * places, 0.5 * places

    def modes(arm: str) -> tuple[float, str]:
        interval = comparison.mean(arm, "modes")
        centre = comparison.centre_covered(arm, toy.layout.covered_share)
        return interval.mean, (
            f"{shown(interval, 1)} of {places} modes; the centre in {centre} of {toy.seeds} seeds"
        )

    rise, free = (comparison.change(START, arm, "proxy") for arm in ("large_beta", "no_kl"))
    raised = f"the proxy rises by {shown(rise, 2, '+')}, with β = 0 by {shown(free, 2, '+')}"
    rows = [
        ("large β does not raise the reward", raised, "it rises less than a quarter as much",
         rise.mean < free.mean / 4),
    ]  # fmt: skip
    for arm, claim in (
        ("small_beta", "small β collapses to a few modes"),
        ("diversity", "diversity alone covers all modes, centre included"),
        (OURS, "GARDO covers all modes"),
    ):
        mean, measured = modes(arm)
        if arm == "small_beta":
            rows.append((claim, measured, f"at most {few:g}", mean <= few))
        else:
            rows.append((claim, measured, f"at least {most:g}", mean >= most))
    for measure in ("proxy", "true"):
        others = [comparison.change(arm, OURS, measure) for arm in toy.arms if arm != OURS]
        least = min(others, key=lambda interval: interval.low)
        claim = f"GARDO has the highest {MEASURES[measure][0]}"
        measured = f"its least lead over an arm: {shown(least, 2, '+')}"
        rows.append((claim, measured, "every interval is above 0", least.low > 0))
    lines = ["| the paper's claim | measured | holds where | |", "|---|---|---|---|"]
    for claim, measured, limit, holds in rows:
        lines.append(
            f"| {claim} | {measured} | {limit} | {'holds' if holds else '**does not hold**'} |"
        )
    return "\n".join(lines)


def note(toy: Toy, path: Path) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seconds = sum(float(row["cpu_seconds"]) for row in rows)
    first, layout = rows[0], toy.layout
    return (
        f"Means over {toy.seeds} seeds with 95 % bootstrap intervals; differences are paired by "
        f"seed, which fixes the pre-trained policy and all noise. "
        f"{toy.training.evaluation_samples} samples a run. A mode is covered with at least "
        f"{100 * layout.covered_share:g} % of the samples within {layout.covered_radius:g} of it; "
        f"a seed is hacked with most of its samples in the spurious region. "
        f"{seconds / 60:.0f} minutes of CPU time, torch {first['torch']}, Python "
        f"{first['python']}, revision {first['revision']}."
    )

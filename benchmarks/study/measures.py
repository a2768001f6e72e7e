"""What a cell came to, from its raw metrics; and arms against each other, paired by seed.

A seed is the unit of every interval: all captions of the world are evaluated, so they are no
sample, and the images of a cell are means within it.

Shapes: S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from gardo.evaluation.statistics import Interval, bootstrap_mean
from gardo.report.metrics_log import Record
from study.protocol import Rules
from study.raw import Raw

PROXY, HELD_OUT, PATCHES = "tiny_count", "tiny_fidelity", "tiny_patches"
AUXILIARIES = ("tiny_shape", "tiny_purity")
NEVER = float("inf")


@dataclass(frozen=True)
class Curve:
    """Means of the evaluated measures over the evaluations of a cell, or of a part of its prompts.

    Rewards are in percent points of change from the start, but for `start`.
    """

    steps: list[int]
    start: dict[str, float]
    change: dict[str, list[float]]
    diversity: dict[str, list[float]]
    drift: list[float]
    gated: float  # mean share of the samples under the KL over the run, in percent; 0 without one

    def end(self, reward: str) -> float:
        return self.change[reward][-1]


def curve(raw: Raw, prompts: Sequence[int] | None = None) -> Curve:
    """Over all prompts of the evaluation, or those with these indices."""

    def mean(record: Record, reward: str) -> float:
        values = record["by_prompt"][reward]
        return 100 * fmean(values if prompts is None else [values[i] for i in prompts])

    first, names = raw.evaluations[0], raw.evaluations[0]["by_prompt"]
    start = {name: mean(first, name) for name in names}
    return Curve(
        steps=raw.evaluated,
        start=start,
        change={n: [mean(r, n) - start[n] for r in raw.evaluations] for n in names},
        diversity={n: [r["diversity"][n] for r in raw.evaluations] for n in first["diversity"]},
        drift=[r["drift"] for r in raw.evaluations],
        gated=100 * fmean([r["metrics"].get("gate_share", 0.0) for r in raw.steps] or [0.0]),
    )


def stopped_early(of: Curve, rules: Rules) -> Curve:
    """What a practitioner keeps who watches the auxiliaries: the weights of the evaluation before
    the first at which one of these is `auxiliary_fall` below its best so far."""
    best = dict.fromkeys(AUXILIARIES, 0.0)
    kept = len(of.steps) - 1
    for k in range(1, len(of.steps)):
        changes = {name: of.change[name][k] for name in AUXILIARIES}
        if any(changes[name] < best[name] - rules.auxiliary_fall for name in AUXILIARIES):
            kept = k - 1
            break
        best = {name: max(best[name], changes[name]) for name in AUXILIARIES}

    def held(values: list[float]) -> list[float]:
        return [*values[: kept + 1], *[values[kept]] * (len(values) - kept - 1)]

    return Curve(
        of.steps,
        of.start,
        {n: held(v) for n, v in of.change.items()},
        {n: held(v) for n, v in of.diversity.items()},
        held(of.drift),
        of.gated,
    )


def area(steps: Sequence[int], values: Sequence[float]) -> float:
    """Mean height of the curve between its first and last step, by trapezes."""
    parts = zip(steps, steps[1:], values, values[1:], strict=False)
    return sum((b - a) * (u + v) / 2 for a, b, u, v in parts) / (steps[-1] - steps[0])


def both(of: Curve) -> list[float]:
    """The lesser of the two changes at every evaluation: what was learnt and not paid for."""
    pairs = zip(of.change[PROXY], of.change[HELD_OUT], strict=True)
    return [min(pair) for pair in pairs]


def images_to_level(of: Curve, images: int, rules: Rules) -> float:
    """Images sampled until the proxy has risen by `level` while the held-out has not fallen."""
    for step, proxy, held_out in zip(of.steps, of.change[PROXY], of.change[HELD_OUT], strict=True):
        if proxy >= rules.level and held_out >= -rules.tolerance:
            return step * images
    return NEVER


MEASURES: dict[str, Callable[[Curve], float]] = {
    "proxy": lambda c: c.end(PROXY),
    "held_out": lambda c: c.end(HELD_OUT),
    "patches": lambda c: c.end(PATCHES),
    "layout": lambda c: c.diversity["layout"][-1],
    "size": lambda c: c.diversity["size"][-1],
    "hue": lambda c: c.diversity["hue"][-1],
    "features": lambda c: c.diversity["features"][-1],
    "drift": lambda c: c.drift[-1],
    "gated": lambda c: c.gated,
    "area_proxy": lambda c: area(c.steps, c.change[PROXY]),
    "area_held_out": lambda c: area(c.steps, c.change[HELD_OUT]),
    "area_both": lambda c: area(c.steps, both(c)),
}

Arms = Mapping[str, Mapping[int, Curve]]  # {arm: {seed: curve}}


def interval(values: Sequence[float]) -> Interval:
    """Over seeds."""
    return bootstrap_mean(torch.tensor(values, dtype=torch.float64))


def of_arm(arms: Arms, arm: str, measure: str) -> dict[int, float]:
    return {seed: MEASURES[measure](c) for seed, c in arms[arm].items()}


def paired(arms: Arms, one: str, other: str, measure: str) -> list[float]:
    """`one` - `other` with every seed that both have."""
    of_one, of_other = of_arm(arms, one, measure), of_arm(arms, other, measure)
    return [of_one[seed] - of_other[seed] for seed in of_one if seed in of_other]


def wins(arms: Arms, one: str, other: str, measure: str) -> tuple[float, int]:
    """In how many of how many shared seeds `one` is higher; a tie is half a win."""
    differences = paired(arms, one, other, measure)
    return sum(0.5 + 0.5 * (d > 0) - 0.5 * (d < 0) for d in differences), len(differences)

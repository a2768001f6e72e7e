"""What a run came to, in a few sentences made from its first and last evaluation.

A change counts only if its 95 % interval, paired by prompt, excludes zero. The proxy is what was
optimised; a held-out reward that falls while it rises is the sign that the proxy was exploited. A
fall is large where it is at least `LARGE` of the first evaluation's standard deviation between
prompts: that has no unit, and a reward's zero does not matter to it. In docs/evidence.md's study
such falls tell the runs without a KL from those of GARDO; smaller ones are among both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from gardo.report.metrics_log import Record
from gardo.report.progress import format_interval, format_number

RECENT = 20  # steps that the gate's catch is a mean of
LARGE = 0.8  # a standard deviation between prompts: what is called a large effect


@dataclass(frozen=True)
class Verdict:
    """Sentences in plain text. `tone` is "good", "bad" or "" (nothing to conclude)."""

    tone: str
    sentences: tuple[str, ...]
    conclusion: str


@dataclass(frozen=True)
class Moved:
    """A reward between the first and the last evaluation.

    `direction`: up, flat, unknown; sank or down, which is a large fall. `words`: the predicate.
    """

    name: str
    role: str
    direction: str
    words: str


def moved(evaluations: Sequence[Record]) -> list[Moved]:
    """Proxies and held-out rewards of the last of at least two evaluations, proxies first."""
    first, last = evaluations[0], evaluations[-1]
    return [
        Moved(name, role, *_change(name, first, last))
        for role in ("proxy", "held_out")
        for name, reward in last.get("rewards", {}).items()
        if reward.get("role") == role
    ]


def judge(evaluations: Sequence[Record], steps: Sequence[Record] = ()) -> Verdict:
    """The verdict on a run from its evaluations and its last steps, in the order logged."""
    if len(evaluations) < 2:
        missing = "Only one evaluation" if evaluations else "No evaluation yet"
        return Verdict("", (), f"{missing}: nothing to compare.")
    first, last = evaluations[0], evaluations[-1]
    changes = moved(evaluations)
    labels = {"proxy": "The proxy", "held_out": "Held-out"}
    sentences = [f"{labels[one.role]} {one.name} {one.words}." for one in changes]
    kinds = [
        _kind(name, first.get("diversity", {}).get(name), value)
        for name, value in last.get("diversity", {}).items()
    ]
    if kinds:
        sentences.append(f"Diversity: {', '.join(kinds)}.")
    sentences += _caught(steps[-RECENT:])
    proxy, held_out = (
        {one.direction for one in changes if one.role == role} for role in ("proxy", "held_out")
    )
    tone, conclusion = _conclude(proxy, held_out)
    return Verdict(tone, tuple(sentences), conclusion)


@dataclass(frozen=True)
class Gap:
    """Changes since the first evaluation, in standard deviations between its prompts.

    The means over proxies and over held-out rewards. Where the gap grows because `held_out` falls,
    and not because `proxy` rises, the proxy is being exploited.
    """

    step: int
    proxy: float
    held_out: float

    @property
    def gap(self) -> float:
        return self.proxy - self.held_out


def gaps(evaluations: Sequence[Record]) -> list[Gap]:
    """One for each evaluation; none where there is no proxy or no held-out reward that can be
    measured so."""
    if not evaluations:
        return []
    first = evaluations[0]
    scales = {name: spread_between_prompts(first, name) for name in first.get("rewards", {})}
    found = []
    for one in evaluations:
        moves: dict[str, list[float]] = {"proxy": [], "held_out": []}
        for name, reward in one.get("rewards", {}).items():
            start, scale = first.get("rewards", {}).get(name, {}), scales.get(name, 0.0)
            if reward.get("role") in moves and scale > 0 and _known(reward.get("mean")):
                moves[reward["role"]].append((reward["mean"] - start["mean"]) / scale)
        if all(moves.values()):
            found.append(Gap(one["step"], fmean(moves["proxy"]), fmean(moves["held_out"])))
    return found


def spread_between_prompts(evaluation: Record, name: str) -> float:
    """The standard deviation of a reward's means of prompts; NaN where the record does not say.

    From these means, or from the interval of their mean.
    """
    values = [value for value in evaluation.get("by_prompt", {}).get(name, ()) if _known(value)]
    if len(values) > 1:
        return stdev(values)
    reward, prompts = evaluation.get("rewards", {}).get(name, {}), evaluation.get("prompt_count")
    if prompts and _known(reward.get("low")) and _known(reward.get("high")):
        return float(reward["high"] - reward["low"]) / (2 * 1.96) * math.sqrt(prompts)
    return math.nan


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _caught(steps: Sequence[Record]) -> list[str]:
    """Whether held-out judges think less of what the gate holds back than of all samples."""
    found = []
    for name in dict.fromkeys(name for step in steps for name in step.get("rewards", {})):
        rows = [step["rewards"][name] for step in steps if "gated" in step["rewards"].get(name, {})]
        if not rows or rows[-1].get("role") != "held_out":
            continue
        gated, everyone = (fmean(row[key] for row in rows) for key in ("gated", "mean"))
        if math.isfinite(gated - everyone):
            found.append(
                f"By {name} the gated samples had {format_number(gated, 3)}, all together "
                f"{format_number(everyone, 3)} (last {len(rows)} steps with a gate)."
            )
    return found


def _change(name: str, first: Record, last: Record) -> tuple[str, str]:
    """Direction of one reward, as `Moved` has it, and words for it."""
    before = first.get("rewards", {}).get(name, {}).get("mean")
    ends = f"from {format_number(before, 3)} to {format_number(last['rewards'][name]['mean'], 3)}"
    change = last.get("change", {}).get(name, {})
    mean, low, high = (change.get(key) for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None or not math.isfinite(mean + low + high):
        return "unknown", f"went {ends} (no interval)"
    if low > 0:
        return "up", f"rose by {format_interval(change)}, {ends}"
    if high < 0:
        size = {"mean": -mean, "low": -high, "high": -low}
        little = -mean < LARGE * spread_between_prompts(first, name)
        return "sank" if little else "down", f"fell by {format_interval(size)}, {ends}"
    return "flat", f"did not clearly change: {format_interval(change, signed=True)}, {ends}"


def _kind(name: str, before: float | None, after: float | None) -> str:
    """One kind of diversity: `layout 2.94 to 2.82 (-4 %)`."""
    words = f"{name} {format_number(before, 3)} to {format_number(after, 3)}"
    if before is None or after is None or before <= 0 or not math.isfinite(after / before):
        return words
    percent = round(100 * (after / before - 1))
    return f"{words} ({percent:+d}\u00a0%)" if percent else f"{words} (0\u00a0%)"


def _conclude(proxy: set[str], held_out: set[str]) -> tuple[str, str]:
    """Tone and the last sentence."""
    if not proxy:
        return "", "No proxy reward was evaluated."
    if "down" in held_out:
        if "up" in proxy:
            return "bad", "The proxy rose while a held-out reward fell: the sign of reward hacking."
        return "bad", "A held-out reward fell, and the proxy did not clearly rise."
    if "sank" in held_out and "up" in proxy:
        return "", "The proxy rose; a held-out reward fell, by less than prompts differ."
    if "up" not in proxy:
        if "unknown" in proxy:
            return "", "Without an interval nothing can be concluded."
        return "", "The proxy did not clearly rise."
    if not held_out:
        return "", "The proxy rose; no held-out reward was measured beside it."
    if "unknown" in held_out:
        return "", "The proxy rose; a held-out reward has no interval."
    return "good", "The proxy rose, and no held-out reward clearly fell."

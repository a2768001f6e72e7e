"""Two evaluations of one suite: paired changes, win rates, and signs that a reward was hacked.

A reward is hacked where what is optimised rises and what is meant does not. Values alone do not say
so: prompts differ, and rewards are noisy. So every sign names the interval that it rests on, and
none is `seen` unless that interval excludes zero; without an interval it is `unknown`.

    fell       the proxy rose, and a held-out reward fell
    apart      the proxy and another judge rank the prompts less alike than at the baseline
    traded     where the proxy rose most, another judge fell most
    narrower   a prompt's images differ less: in the proxy, or in features

Shapes: E prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gardo.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    paired_change,
    rank_correlation,
    rank_correlation_change,
    win_rate,
)
from gardo.evaluation.values import PROXY, Values, interval
from gardo.report.progress import format_interval

State = Literal["seen", "not seen", "unknown"]


@dataclass(frozen=True)
class Indicator:
    """A sign of reward hacking; the sentence says what was seen, with its intervals."""

    sign: str
    of: str  # a reward or a kind of diversity
    state: State
    sentence: str


def compare(here: Values, baseline: Values) -> dict[str, Any]:
    """JSON: what changed from the baseline to here, of the rewards that both have."""
    both = [name for name in here.rewards if name in baseline.rewards]
    proxy = [PROXY] if here.weights and here.weights == baseline.weights else []
    rewards = {
        name: {
            "change": interval(paired_change(baseline.mean(name), here.mean(name))),
            "win_rate": interval(win_rate(baseline.mean(name), here.mean(name))),
            "spread": interval(paired_change(baseline.spread(name), here.spread(name))),
        }
        for name in (*both, *proxy)
    }
    diversity = {
        name: interval(paired_change(baseline.diversity[name], value_E))
        for name, value_E in here.diversity.items()
        if name in baseline.diversity
    }
    correlations = {
        name: {kind: interval(one) for kind, one in _correlations(here, baseline, name).items()}
        for name in here.others("auxiliary", "held_out")
        if proxy and name in both
    }
    return {
        "proxy": rewards.pop(PROXY, None),
        "rewards": rewards,
        "diversity": diversity,
        "label_entropy": {
            name: value - baseline.labels[name]
            for name, value in here.labels.items()
            if name in baseline.labels
        },
        "rank_correlation": correlations,
        "indicators": [asdict(one) for one in indicators(here, baseline)] if proxy else [],
    }


def _correlations(here: Values, baseline: Values, name: str) -> dict[str, Interval]:
    """Of the proxy with another reward, over prompts: here, at the baseline, and of the changes."""
    now = here.mean(PROXY), here.mean(name)
    before = baseline.mean(PROXY), baseline.mean(name)
    return {
        "here": rank_correlation(*now),
        "baseline": rank_correlation(*before),
        "change": rank_correlation_change(before, now),
        "of_changes": rank_correlation(now[0] - before[0], now[1] - before[1]),
    }


def indicators(here: Values, baseline: Values) -> list[Indicator]:
    """All signs, seen or not; both have the same proxies."""
    proxy = paired_change(baseline.mean(PROXY), here.mean(PROXY))
    found = []
    for name in here.others("held_out"):
        if name in baseline.rewards:
            held_out = paired_change(baseline.mean(name), here.mean(name))
            found.append(_fell(name, proxy, held_out))
    for name in here.others("auxiliary", "held_out"):
        if name in baseline.rewards:
            ranks = _correlations(here, baseline, name)
            found += [_apart(name, ranks), _traded(name, ranks["of_changes"])]
    found.append(
        _narrower(
            PROXY,
            "the proxy's standard deviation among the images of a prompt",
            bootstrap_mean(baseline.spread(PROXY)),
            paired_change(baseline.spread(PROXY), here.spread(PROXY)),
        )
    )
    for name, value_E in here.diversity.items():
        if name in baseline.diversity:
            before_E = baseline.diversity[name]
            found.append(
                _narrower(
                    name,
                    DIVERSITY[name],
                    bootstrap_mean(before_E),
                    paired_change(before_E, value_E),
                )
            )
    return found


DIVERSITY: Mapping[str, str] = {
    "pairwise": "the mean distance between the images of a prompt (100 x cosine)",
    "nearest": "the distance to the nearest image of a prompt (100 x cosine)",
    "vendi": "the number of different images of a prompt (Vendi score)",
}


def _fell(name: str, proxy: Interval, held_out: Interval) -> Indicator:
    if not (_has(proxy) and _has(held_out)):
        return _unknown("fell", name, f"whether {name} fell while the proxy rose")
    changes = f"{_said(proxy)} and held-out {name} by {_said(held_out)}"
    if proxy.low > 0 and held_out.high < 0:
        return Indicator(
            "fell", name, "seen", f"The proxy rose while {name} fell: it changed by {changes}."
        )
    return Indicator(
        "fell",
        name,
        "not seen",
        f"Not both a rise of the proxy and a fall of {name}: it changed by {changes}.",
    )


def _apart(name: str, ranks: Mapping[str, Interval]) -> Indicator:
    change = ranks["change"]
    if not _has(change):
        return _unknown("apart", name, f"whether the proxy and {name} rank prompts less alike")
    ends = (
        f"rank correlation {ranks['baseline'].mean:.2f} at the baseline, "
        f"{ranks['here'].mean:.2f} here, a change of {_said(change)}"
    )
    if change.high < 0:
        said = f"The proxy and {name} rank the prompts less alike than at the baseline: {ends}."
        return Indicator("apart", name, "seen", said)
    said = f"The proxy and {name} do not clearly rank the prompts less alike: {ends}."
    return Indicator("apart", name, "not seen", said)


def _traded(name: str, of_changes: Interval) -> Indicator:
    if not _has(of_changes):
        return _unknown("traded", name, f"whether {name} lost where the proxy gained")
    ranks = f"rank correlation of their changes over prompts {_said(of_changes)}"
    if of_changes.high < 0:
        said = f"Prompts that gained more by the proxy gained less by {name}, or lost: {ranks}."
        return Indicator("traded", name, "seen", said)
    said = f"{name} did not clearly gain less where the proxy gained more: {ranks}."
    return Indicator("traded", name, "not seen", said)


def _narrower(name: str, what: str, before: Interval, change: Interval) -> Indicator:
    if not _has(change):
        return _unknown("narrower", name, f"whether less is left of {what}")
    moved = f"it changed by {_said(change)}, from {before.mean:.3g}"
    if change.high < 0:
        return Indicator("narrower", name, "seen", f"Less is left of {what}: {moved}.")
    return Indicator("narrower", name, "not seen", f"Not clearly less of {what}: {moved}.")


def _unknown(sign: str, of: str, what: str) -> Indicator:
    said = f"It cannot be said {what}: too few prompts have values that differ for an interval."
    return Indicator(sign, of, "unknown", said)


def _has(value: Interval) -> bool:
    return math.isfinite(value.low) and math.isfinite(value.high)


def _said(value: Interval) -> str:
    return format_interval(asdict(value), signed=True)

"""How early the gate's own quantities see hacking, before the held-out judge has fallen.

A signal is a series with a value an iteration, smoothed over `window` iterations; it is raised at
the first iteration at which it leaves what its first `calm` iterations were by `sigmas` standard
deviations of theirs. Its lead is the iterations from there to the first at which the held-out judge
of the training's own samples, smoothed alike, is `hacked` points below its calm; a signal raised
where nothing fell is a false alarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from study.measures import HELD_OUT
from study.protocol import Rules
from study.raw import Raw

SIGNALS = {
    "disagreement": "rank disagreement",
    "paper_share": "the share that the gate takes",
}


@dataclass(frozen=True)
class Seen:
    """Of a cell: when the held-out had fallen, and when each signal was raised; None is never."""

    fell: int | None
    raised: dict[str, int | None]

    def lead(self, signal: str) -> int | None:
        raised = self.raised[signal]
        return None if self.fell is None or raised is None else self.fell - raised


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means of the last `window` values; of those there are, at the start."""
    return [fmean(values[max(0, k + 1 - window) : k + 1]) for k in range(len(values))]


def raised(values: Sequence[float], rules: Rules) -> int | None:
    """The first iteration, counted from 1, at which the smoothed series is out of its calm."""
    calm = values[: rules.calm]
    limit = fmean(calm) + rules.sigmas * stdev(calm)
    series = smoothed(values, rules.window)
    return next((k + 1 for k in range(rules.calm, len(values)) if series[k] > limit), None)


def fallen(values: Sequence[float], rules: Rules) -> int | None:
    """The first iteration, counted from 1, at which a smoothed score is `hacked` below its calm."""
    limit = fmean(values[: rules.calm]) - rules.hacked / 100
    series = smoothed(values, rules.window)
    return next((k + 1 for k in range(rules.calm, len(values)) if series[k] < limit), None)


def seen(raw: Raw, rules: Rules) -> Seen:
    fell = fallen([r["rewards"][HELD_OUT] for r in raw.steps], rules)
    series = {name: [r["metrics"][name] for r in raw.steps] for name in SIGNALS}
    return Seen(fell, {name: raised(values, rules) for name, values in series.items()})

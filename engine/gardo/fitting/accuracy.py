"""How well a fitted reward says what was preferred: accuracy, log-loss, calibration.

    accuracy     share of the pairs with a preference whose better picture has the higher mean score
    log-loss     -mean of p log P + (1 - p) log(1 - P), ties as halves; 0.693 knows nothing
    calibration  mean of max(P, 1 - P), against how often that side was preferred

P(first) is that of the heads' mean, which is what the reward gives. Intervals are Wilson's over
pairs, which takes them as independent, and a bootstrap over prompts, which does not: pairs of one
prompt are alike, and the wider of the two is the honest one.

Shapes: N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gardo.evaluation.statistics import LEAST_RESAMPLED, Interval, bootstrap_mean, win_rate
from gardo.evaluation.values import interval, number

BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of max(P, 1 - P)


@dataclass(frozen=True)
class Bin:
    """Pairs of which the reward is about as sure."""

    pairs: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Accuracy:
    """Of some pairs."""

    pairs: int
    ties: int  # of the pairs; they count for log-loss and calibration alone
    accuracy: Interval  # Wilson's, over pairs with a preference
    by_prompt: Interval  # bootstrap over prompts; NaN where they are too few
    log_loss: float
    predicted: float
    observed: float
    bins: list[Bin]

    @property
    def knows_nothing(self) -> bool:
        """Whether an accuracy of 0.5 cannot be ruled out by both intervals."""
        ends = [i.low for i in (self.accuracy, self.by_prompt) if not math.isnan(i.low)]
        return not ends or min(ends) <= 0.5

    def as_json(self) -> dict[str, Any]:
        said = asdict(self)
        said |= {"accuracy": interval(self.accuracy), "by_prompt": interval(self.by_prompt)}
        return said | {n: number(said[n]) for n in ("log_loss", "predicted", "observed")}

    def __str__(self) -> str:
        text = f"accuracy {_shown(self.accuracy)}"
        if not math.isnan(self.by_prompt.low):
            text += f", over prompts {_shown(self.by_prompt)}"
        return (
            f"{text}; log-loss {self.log_loss:.3f}; sure of {self.predicted:.2f}, right "
            f"{self.observed:.2f}; {self.pairs} pairs, {self.ties} of them ties"
        )


def _shown(value: Interval) -> str:
    if math.isnan(value.low):
        return f"{value.mean:.2f} (too few for an interval)"
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def measured(
    ahead_N: Tensor, first_N: Tensor, preferred_N: Tensor, prompts: Sequence[str]
) -> Accuracy:
    """Of pairs: the difference of the mean scores, P(first), and the verdict p."""
    decided_N = preferred_N != 0.5
    side_N = (preferred_N[decided_N] - 0.5).sign() * ahead_N[decided_N]
    right_N = (side_N.sign() + 1) / 2
    by_prompt: dict[str, list[float]] = {}
    for at, right in zip(decided_N.nonzero()[:, 0].tolist(), right_N.tolist(), strict=True):
        by_prompt.setdefault(prompts[at], []).append(right)
    means = [sum(found) / len(found) for found in by_prompt.values()]
    if len(means) < LEAST_RESAMPLED:
        means = []
    sure_N = torch.maximum(first_N, 1 - first_N)
    agreed_N = torch.where(first_N >= 0.5, preferred_N, 1 - preferred_N)
    loss = torch.nn.functional.binary_cross_entropy(
        first_N.clamp(1e-12, 1 - 1e-12), preferred_N, reduction="mean"
    )
    return Accuracy(
        pairs=len(preferred_N),
        ties=int((~decided_N).sum()),
        accuracy=win_rate(torch.zeros_like(side_N), side_N),
        by_prompt=bootstrap_mean(torch.tensor(means, dtype=torch.float64)),
        log_loss=float(loss),
        predicted=float(sure_N.mean()),
        observed=float(agreed_N.mean()),
        bins=_bins(sure_N, agreed_N),
    )


def _bins(sure_N: Tensor, agreed_N: Tensor) -> list[Bin]:
    found = []
    for low, high in pairwise(BINS):
        inside_N = (sure_N >= low) & ((sure_N < high) | (high == BINS[-1]))
        if inside_N.any():
            sure, agreed = sure_N[inside_N], agreed_N[inside_N]
            found.append(Bin(len(sure), float(sure.mean()), float(agreed.mean())))
    return found

"""Means and rank correlations with bootstrap intervals, paired changes, entropy of labels.

The unit is the prompt, not the image: images of one prompt resemble each other, and an interval
that counts them as independent is too narrow. So a caller averages the images of a prompt first
and hands over one value for each prompt.

Shapes: U units (prompts), S resamples, C values of a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

RANK_RESAMPLES = 2_000  # each sorts its units
LEAST_RESAMPLED = 5  # units of a bootstrap interval
LEAST_RANKED = 5  # units of an interval of a rank correlation

_BLOCK = 1 << 22  # random indices drawn at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval; the metrics log takes its `dataclasses.asdict`."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values_by_unit: Tensor, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Mean over units with an expanded percentile bootstrap interval.

    Hesterberg 2015, doi 10.1080/00031305.2015.1089789.

    The plain percentile interval is too narrow for few units: its spread is that of the plug-in
    variance (1/U, not 1/(U - 1)) and of a normal, not of Student's t. So the percentiles taken are
    those of Phi(-+ sqrt(U / (U - 1)) t) with t the quantile of Student's t at U - 1 degrees of
    freedom. Measured coverage on normal data at level 0.95: 0.92 with 5 units, 0.94 to 0.95 with 8
    to 36; the plain interval has 0.85, 0.90 (8) and 0.93 (36). Of fewer than 5 units the resamples
    know too little: their interval is Student's.

    Args:
        values_by_unit: [U], any real dtype and device; NaN marks a unit without a value, which is
            dropped.
        seed: of a generator of its own: the same values and seed give the same interval.
        resamples: S, how many bootstrap samples.
        level: coverage aimed at, between 0 and 1.

    Returns:
        The interval, in the values' unit. Both ends are NaN with one unit (its spread is unknown);
        the mean too with none.

    Raises:
        ValueError: not one-dimensional, or `resamples` or `level` out of range.
    """
    if values_by_unit.ndim != 1:
        raise ValueError(
            f"expected one value for each unit, got shape {tuple(values_by_unit.shape)}"
        )
    if resamples < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"resamples {resamples} must be positive and level {level} between 0 and 1"
        )
    values_U = values_by_unit.detach().to("cpu", torch.float64)
    values_U = values_U[~values_U.isnan()]
    units = len(values_U)
    mean = values_U.mean().item()
    if units < 2:
        return Interval(mean, math.nan, math.nan)
    if units < LEAST_RESAMPLED:
        reach = _student_quantile(0.5 + level / 2, units - 1) * values_U.std().item() / units**0.5
        return Interval(mean, mean - reach, mean + reach)

    means_S = _resampled(
        values_U[:, None], lambda drawn_SUC: drawn_SUC[..., 0].mean(1), seed, resamples
    )
    return Interval(mean, *_ends(means_S, units, level))


def _resampled(
    columns_UC: Tensor, statistic: Callable[[Tensor], Tensor], seed: int, resamples: int
) -> Tensor:
    """The statistic of bootstrap samples, [S] fp64: units are drawn, with all their columns.

    `statistic` takes fp64 [s, U, C] to [s]. The same seed draws the same units.
    """
    generator = torch.Generator().manual_seed(seed)
    units = len(columns_UC)
    rows = max(1, _BLOCK // units)
    found: list[Tensor] = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), units)
        found.append(statistic(columns_UC[torch.randint(units, shape, generator=generator)]))
    return torch.cat(found)


def _ends(found_S: Tensor, units: int, level: float) -> tuple[float, float]:
    """The ends of the expanded percentile interval of a statistic of so many units."""
    reach = math.sqrt(units / (units - 1)) * _student_quantile(0.5 + level / 2, units - 1)
    tail = torch.special.ndtr(torch.tensor(-reach, dtype=torch.float64)).item()
    ends = torch.quantile(found_S, torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
    return ends[0].item(), ends[1].item()


def paired_change(
    before_by_unit: Tensor,
    after_by_unit: Tensor,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of `after - before` over units with its interval; a unit NaN in either is dropped.

    Pairing removes what prompts differ by (and, with fixed noise, much of what images differ by),
    so it sees changes that two separate intervals would hide. Arguments and errors as
    `bootstrap_mean`; the shapes must agree.
    """
    if before_by_unit.shape != after_by_unit.shape:
        shapes = f"{tuple(before_by_unit.shape)} and {tuple(after_by_unit.shape)}"
        raise ValueError(f"before and after must hold the same units, got shapes {shapes}")
    before_U = before_by_unit.detach().to("cpu", torch.float64)
    after_U = after_by_unit.detach().to("cpu", torch.float64)
    return bootstrap_mean(after_U - before_U, seed=seed, resamples=resamples, level=level)


def prompt_means(values_I: Tensor, images_per_prompt: int) -> Tensor:
    """fp64 [U]: the mean of each prompt's images, of those that have a value; NaN where none has.

    `values_I` holds the images of a prompt one after the other.
    """
    return values_I.view(-1, images_per_prompt).double().nanmean(1)


def win_rate(before_by_unit: Tensor, after_by_unit: Tensor, *, level: float = 0.95) -> Interval:
    """Share of the units where `after` is the higher one, a tie counting half.

    The interval is Wilson's (1927): where all units win, resamples would all say the same. A unit
    that is NaN in either is dropped; with one unit or none there is no interval.
    """
    difference_U = after_by_unit.double() - before_by_unit.double()
    won_U = (difference_U[~difference_U.isnan()].sign() + 1) / 2
    units, rate = len(won_U), won_U.mean().item()
    if units < 2:
        return Interval(rate, math.nan, math.nan)
    z = torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64)).item()
    centre = (rate + z * z / (2 * units)) / (1 + z * z / units)
    reach = math.sqrt(rate * (1 - rate) / units + (z / (2 * units)) ** 2) * z / (1 + z * z / units)
    return Interval(rate, max(0.0, centre - reach), min(1.0, centre + reach))


def rank_correlation(
    first_by_unit: Tensor,
    second_by_unit: Tensor,
    *,
    seed: int = 0,
    resamples: int = RANK_RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """Spearman's rank correlation of two values of the units, with an interval over units.

    Ties share their mean rank. The interval is that of `bootstrap_mean`, of units drawn with both
    their values. Units that are NaN in either are dropped.

    Returns:
        `mean` is the correlation. All is NaN where it is not defined: one side without any spread;
        the ends alone with fewer than LEAST_RANKED units, whose resamples have too few ranks.
    """
    return _ranked(
        torch.stack([first_by_unit, second_by_unit], 1), _spearman, seed, resamples, level
    )


def rank_correlation_change(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    *,
    seed: int = 0,
    resamples: int = RANK_RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """The rank correlation of the pair `after` less that of the pair `before`, of the same units.

    Units are drawn with all four values. As `rank_correlation` otherwise.
    """

    def change(drawn_SUC: Tensor) -> Tensor:
        return _spearman(drawn_SUC[..., 2:]) - _spearman(drawn_SUC[..., :2])

    return _ranked(torch.stack([*before, *after], 1), change, seed, resamples, level)


def _ranked(
    columns_by_unit: Tensor,
    statistic: Callable[[Tensor], Tensor],
    seed: int,
    resamples: int,
    level: float,
) -> Interval:
    columns_UC = columns_by_unit.detach().to("cpu", torch.float64)
    columns_UC = columns_UC[~columns_UC.isnan().any(1)]
    units = len(columns_UC)
    if not units:
        return Interval(math.nan, math.nan, math.nan)
    value = statistic(columns_UC[None]).item()
    if units < LEAST_RANKED or math.isnan(value):
        return Interval(value, math.nan, math.nan)
    found_S = _resampled(columns_UC, statistic, seed, resamples)
    found_S = found_S[~found_S.isnan()]  # one unit alone was drawn, again and again
    if not len(found_S):
        return Interval(value, math.nan, math.nan)
    return Interval(value, *_ends(found_S, units, level))


def _spearman(columns_SU2: Tensor) -> Tensor:
    """[S] rank correlations of the two columns; NaN where one has no spread."""
    first_SU, second_SU = (_ranks(c) for c in columns_SU2.unbind(-1))
    first_SU = first_SU - first_SU.mean(1, keepdim=True)
    second_SU = second_SU - second_SU.mean(1, keepdim=True)
    spread_S = (first_SU.square().sum(1) * second_SU.square().sum(1)).sqrt()
    return (first_SU * second_SU).sum(1) / spread_S


def _ranks(values_SU: Tensor) -> Tensor:
    """Ranks from 1 on along the last axis, fp64; equal values share the mean of theirs."""
    values_SU = values_SU.contiguous()
    ordered_SU = values_SU.sort(1).values
    below_SU = torch.searchsorted(ordered_SU, values_SU)
    up_to_SU = torch.searchsorted(ordered_SU, values_SU, right=True)
    return (below_SU + up_to_SU + 1).double() / 2


def entropy(labels: Tensor) -> float:
    """Plug-in entropy of the labels' empirical distribution, in nats: -sum_k p_k log p_k.

    Biased low by about (K - 1) / (2 n) for K labels seen n times in all: compare only equal
    numbers of labels.

    Args:
        labels: integers, any shape; negative ones are labels too. No label at all gives NaN.

    Raises:
        TypeError: labels that are not integers.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.numel() == 0:
        return math.nan
    counts = torch.unique(labels, return_counts=True)[1].to("cpu", torch.float64)
    share = counts / counts.sum()
    return abs(float(-(share * share.log()).sum()))  # abs: one label alone is 0, not -0


def _student_quantile(probability: float, freedom: int) -> float:
    """Upper quantile of Student's t by bisection; above 1000 degrees of freedom the normal's."""
    if freedom > 1000:
        return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2
        if _student_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    """P(T <= t), t >= 0, whole degrees of freedom: Abramowitz and Stegun 26.7.3, 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + inside) / 2

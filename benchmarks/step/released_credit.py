"""Advantages, the gate and the skipping of rows as the released scripts have them, on the host.

Rewards come off the device as numpy arrays; advantages go back. `Controller` and `gated` have the
release's sign, ties and base: what `gate: {sign: official_code, ties: ordered, base: nonnegative}`
names in a recipe.

Shapes: N samples of all ranks, B of this one, T trained steps, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
KEPT = 20  # iterations whose extremes move the fraction


def group_advantages(
    prompts: Sequence[str], rewards_NT: NDArray[np.float32], features_ND: NDArray[np.float32]
) -> Array:
    """r less its prompt's mean; positive ones times 1 - cos to the nearest of the group.

    The distance is divided by the group's mean distance; one prompt after the other. fp64 [N, T]
    """
    names, rewards = np.array(prompts), np.array(rewards_NT, dtype=np.float64)
    unit = features_ND / np.linalg.norm(features_ND, ord=2, axis=1, keepdims=True)
    advantages = np.zeros_like(rewards)
    for prompt in np.unique(names):
        chosen = names == prompt
        group = rewards[chosen]
        centred = group - group.mean(axis=0, keepdims=True)
        distance = 1 - np.dot(unit[chosen], unit[chosen].T).clip(-1, 1)
        np.fill_diagonal(distance, np.inf)
        nearest = np.repeat(distance.min(axis=1)[:, None], group.shape[1], axis=1)
        factor = np.where(centred < 0, np.ones_like(nearest), nearest / nearest.mean())
        advantages[chosen] = centred * factor
    return advantages


def zero_std_ratio(prompts: Sequence[str], rewards_N: NDArray[np.float32]) -> float:
    """The share of prompts whose rewards are all the same."""
    names = np.array(prompts)
    return float(np.mean([np.std(rewards_N[names == p]) == 0 for p in np.unique(names)]))


class Controller:
    """The gated fraction, which moves by a tenth when the statistic leaves what it has seen."""

    def __init__(self, fraction: float, limits: tuple[float, float]) -> None:
        self.fraction, self._limits = fraction, limits
        self._seen: list[float] = []

    def update(self, statistic: float) -> None:
        if self._seen and statistic > max(self._seen):
            self.fraction *= 1.1
        elif self._seen and statistic < min(self._seen):
            self.fraction *= 0.9
        self.fraction = float(np.clip(self.fraction, *self._limits))
        self._seen = [*self._seen, statistic][-KEPT:]


def _rank(reward_N: NDArray[np.float32]) -> Tensor:
    """Place in descending order, from 1; equal rewards have different ones."""
    value_N = torch.tensor(reward_N)
    _, order = torch.sort(value_N, descending=True)
    rank_N = torch.empty_like(value_N)
    rank_N[order] = torch.arange(1, len(order) + 1, dtype=rank_N.dtype)
    return rank_N


def gated(
    rewards: Mapping[str, NDArray[np.float32]],
    proxy: str,
    auxiliaries: Sequence[str],
    controller: Controller,
) -> Tensor:
    """bool [N]: above the percentile of those whose proxy ranks no better than the auxiliaries."""
    others = torch.stack([_rank(rewards[name]) for name in auxiliaries]).mean(0)
    excess_N = _rank(rewards[proxy]) - others
    base = np.array([e for e in excess_N.cpu().numpy() if e >= 0])
    controller.update(float(np.mean(base)))
    threshold = np.percentile(base, 100 - 100 * controller.fraction)
    return excess_N > threshold


def rows_kept(advantages_BT: Tensor, batches: int) -> Tensor:
    """bool [B]: samples with an advantage, and random others until `batches` divide their number.

    The SD3 script alone leaves samples out.
    """
    kept_B = advantages_BT.abs().sum(dim=1) != 0
    over = kept_B.sum() % batches
    if over:
        others = torch.where(~kept_B)[0]
        chosen = torch.randperm(len(others), device=others.device)[: batches - over]
        kept_B[others[chosen]] = True
    return kept_B

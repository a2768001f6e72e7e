"""Rewards -> advantages within groups.

Equal rewards give zeros, never NaN; invalid samples get 0 and do not count. All on the host.

Shapes: B samples of all ranks, in groups by `group_B`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from gardo.settings import Strict
from gardo.types import Batch, Credit, Points, Scores

if TYPE_CHECKING:
    from torch import Tensor

Std = Literal["none", "global", "group", "group_unbiased"]
EPS = 1e-4
EPS_UNBIASED = 1e-8


class AdvantageSettings(Strict):
    """`std: none` is GARDO's, `global` Flow-GRPO's default, `group_unbiased` DanceGRPO's.

    `scale` multiplies the result.
    """

    std: Std = Field(
        "global",
        description="what r - the group's mean is divided by: nothing (GARDO), the std of all "
        "samples (Flow-GRPO), of the group, or its unbiased one (DanceGRPO)",
    )
    scale: float = Field(1.0, gt=0, description="multiplies the result")
    combine: Literal["score", "advantage"] = Field(
        "score", description="several proxies: their weighted sum, or that of their advantages"
    )


def group_statistics(
    value_B: Tensor, valid_B: Tensor, group_B: Tensor, *, unbiased: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and std of each sample's group over its valid samples, both fp64 [B].

    The std is the population's; `unbiased` divides by the count less one (0 for a group of one).
    """
    _, index_B = group_B.unique(return_inverse=True)
    weight_B = valid_B.double()
    zeros = torch.zeros(int(index_B.max()) + 1, dtype=torch.float64)
    count = zeros.index_add(0, index_B, weight_B).clamp(min=1)
    value = value_B.double()
    mean_B = (zeros.index_add(0, index_B, value * weight_B) / count)[index_B]
    square_B = (value - mean_B) ** 2 * weight_B
    degrees = (count - 1).clamp(min=1) if unbiased else count
    return mean_B, (zeros.index_add(0, index_B, square_B) / degrees).sqrt()[index_B]


def group_advantage(
    reward_B: Tensor, valid_B: Tensor, group_B: Tensor, settings: AdvantageSettings
) -> Tensor:
    """(r - group mean) / (std + 1e-4) x scale, fp32 [B]; `std: none` leaves the division out.

    `group_unbiased` adds 1e-8, not 1e-4, as DanceGRPO does.
    """
    mean_B, group_std_B = group_statistics(reward_B, valid_B, group_B)
    advantage_B = (reward_B.double() - mean_B) * valid_B
    if settings.std == "group":
        advantage_B = advantage_B / (group_std_B + EPS)
    elif settings.std == "group_unbiased":
        unbiased_B = group_statistics(reward_B, valid_B, group_B, unbiased=True)[1]
        advantage_B = advantage_B / (unbiased_B + EPS_UNBIASED)
    elif settings.std == "global":
        everyone = torch.zeros_like(group_B)
        advantage_B = advantage_B / (group_statistics(reward_B, valid_B, everyone)[1] + EPS)
    return (advantage_B * settings.scale).float()


def combined_advantage(scores: Scores, settings: AdvantageSettings) -> Tensor:
    """The weighted sum of every proxy's own group advantage, fp32 [B].

    Each proxy then counts by its weight, whatever the spread of its values. Without a division by
    std this is the advantage of the weighted sum.
    """
    total_B = torch.zeros_like(scores.proxy_B)
    for name, weight in scores.proxies.items():
        reward_B = torch.where(scores.valid_B, scores.rewards[name], 0.0)
        advantage_B = group_advantage(reward_B, scores.valid_B, scores.group_B, settings)
        total_B = total_B + weight * advantage_B
    return total_B


def group_credit(scores: Scores, settings: AdvantageSettings, *, gate: bool) -> Credit:
    """Group advantages of the proxy, with the same gate for every sample."""
    if settings.combine == "advantage":
        advantage_B = combined_advantage(scores, settings)
    else:
        advantage_B = group_advantage(scores.proxy_B, scores.valid_B, scores.group_B, settings)
    return Credit(advantage_B=advantage_B, gate_B=torch.full_like(scores.valid_B, gate))


def without_credit(points: Points, credit: Credit) -> Tensor:
    """Rows of samples without an advantage and without a KL, bool [R], on the host."""
    return ~_counts(credit.advantage_B, credit.kl_weight_or_gate)[points.sample_R]


def with_credit(batch: Batch) -> Tensor:
    """1.0 in rows with an advantage or a KL, [R]; the others only fill the batch up."""
    return _counts(batch.advantage_R, batch.kl_weight_R).float()


def _counts(advantage: Tensor, kl_weight: Tensor) -> Tensor:
    return (advantage != 0) | (kl_weight != 0)

"""A judge of pairs for the integration tests: the brighter picture wins, by a smooth probability.

Smooth, so that the last bits of a picture, which depend on the ranks, cannot turn a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gardo.rewards.base import Reward, RewardSettings


class Brighter(Reward):
    Settings = RewardSettings

    def compare(
        self, first_N3HW: Tensor, second_N3HW: Tensor, prompts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        ahead_N = (first_N3HW - second_N3HW).mean((1, 2, 3))
        return torch.sigmoid(50 * ahead_N), torch.ones_like(ahead_N, dtype=torch.bool)

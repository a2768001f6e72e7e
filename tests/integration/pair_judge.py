"""A judge of pairs for the integration tests: the brighter picture wins, by a smooth probability.

Smooth, so that the last bits of a picture, which depend on the ranks, cannot turn a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gardo.rewards.base import Reward, RewardSettings
from gardo.types import Prompt


class Brighter(Reward):
    Settings = RewardSettings

    def compare(self, first_N3HW: Tensor, second_N3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.sigmoid(50 * (first_N3HW - second_N3HW).mean((1, 2, 3)))


class Brightest(Reward):
    """The verdict of the stand-in endpoint: 1 for the brighter one, and the second where equal."""

    Settings = RewardSettings

    def compare(self, first_N3HW: Tensor, second_N3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        first, second = (
            (p * 255).round().double().sum((1, 2, 3)) for p in (first_N3HW, second_N3HW)
        )
        return (first > second).float()

"""Values of an evaluation as a test wants them: normal noise around means of prompts; and
rewards that fail."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gardo.evaluation.values import Values
from gardo.rewards.base import Reward, RewardSettings

PROMPTS, IMAGES = 24, 4


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def around(mean_E: Tensor | float, *, spread: float = 0.1, seed: int = 0) -> Tensor:
    """[E, n] images of prompts with these means."""
    means = torch.as_tensor(mean_E, dtype=torch.float64).expand(PROMPTS)
    return means[:, None] + spread * noise(seed, PROMPTS, IMAGES)


def values(proxy: Tensor, *, diversity: float = 30.0, **held_out: Tensor) -> Values:
    return Values(
        rewards={"proxy": proxy, **held_out},
        roles={"proxy": "proxy", **dict.fromkeys(held_out, "held_out")},
        weights={"proxy": 1.0},
        diversity={"pairwise": diversity + noise(9, PROMPTS)},
        labels={},
    )


class Broken(Reward):
    """Has a bug."""

    Settings = RewardSettings

    def score(self, images_B3HW, prompts):
        batch, _ = images_B3HW.shape
        return batch


class Uneven(Reward):
    """Does not load on the second rank."""

    Settings = RewardSettings

    def __init__(self, settings, device):
        super().__init__(settings, device)
        if os.environ["RANK"] == "1":
            raise ValueError("path: no file is here")

    def score(self, images_B3HW, prompts):
        return images_B3HW.mean((1, 2, 3))

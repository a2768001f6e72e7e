"""A proxy that has no value for a share of its images, as a judge whose answers cannot be read."""

from __future__ import annotations

import torch

from gardo.rewards.base import Reward, RewardSettings


class FailingSettings(RewardSettings):
    every_nth: int  # images without a value
    first: int = 0  # calls before that


class Failing(Reward):
    Settings = FailingSettings

    def __init__(self, settings: FailingSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.calls = 0

    def score(self, images_B3HW, prompts):
        self.calls += 1
        value_B = images_B3HW.mean((1, 2, 3))
        if self.calls > self.settings.first:
            value_B[:: self.settings.every_nth] = torch.nan
        return value_B

    @property
    def trouble(self) -> str:
        return "no grade in 'Hm.'"

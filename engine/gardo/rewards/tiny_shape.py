"""Log-probability of the prompt's shape by a small convolutional classifier. Differentiable.

An auxiliary, or ReFL's reward. The net (gardo/tiny/judges.py) was trained on clean pictures of the
world only, so it is an imperfect judge of anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gardo.rewards._tiny import TinyReward
from gardo.rewards.base import RewardSettings
from gardo.tiny import judges, world
from gardo.types import Prompt


class TinyShapeSettings(RewardSettings):
    kind: Literal["tiny_shape"] = "tiny_shape"
    floor: float = Field(-4.0, lt=0, description="log-probabilities are clamped here")


class TinyShape(TinyReward):
    Settings = TinyShapeSettings
    differentiable = True

    def __init__(self, settings: TinyShapeSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.net = judges.shape_judge(device)

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        shape_B1 = world.asked(prompts, images_B3HW.device).shape_B[:, None]
        log_probability_B = self.net(images_B3HW).log_softmax(-1).gather(1, shape_B1)[:, 0]
        return log_probability_B.clamp(min=self.settings.floor)


PLUGIN = TinyShape

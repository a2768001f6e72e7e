"""Log-probability of the prompt's shape by a small convolutional classifier. Differentiable.

An auxiliary, or ReFL's reward. The net (gardo/tiny/judges.py) was trained on clean pictures of the
world only, so it is an imperfect judge of anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from gardo.rewards._tiny import TinyReward, TinySettings
from gardo.rewards.base import About
from gardo.tiny import world

if TYPE_CHECKING:
    from torch import Tensor


class TinyShapeSettings(TinySettings):
    kind: Literal["tiny_shape"] = "tiny_shape"
    floor: float = Field(-4.0, lt=0, description="log-probabilities are clamped here")


class TinyShape(TinyReward):
    Settings = TinyShapeSettings
    about = About("log-probability of the shape, by a small net", "below 0", verified="in full")
    differentiable = True

    def __init__(self, settings: TinyShapeSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        from gardo.tiny.judges import shape_judge

        self.net = shape_judge(device)

    def values(self, images_B3HW: Tensor, asked: world.Asked) -> Tensor:
        shape_B1 = asked.shape_B[:, None]
        log_probability_B = self.net(images_B3HW).log_softmax(-1).gather(1, shape_B1)[:, 0]
        return log_probability_B.clamp(min=self.settings.floor)


PLUGIN = TinyShape

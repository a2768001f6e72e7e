"""Log-probability of the prompt's shape by a small convolutional classifier. Differentiable.

An auxiliary, or ReFL's reward. Trained on clean pictures of the world only (gardo.tiny.make), so it
is an imperfect judge of anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from gardo.rewards.base import Reward, RewardSettings
from gardo.tiny import world
from gardo.types import Prompt

WEIGHTS = Path(__file__).parents[1] / "tiny" / "weights" / "judges" / "shape.safetensors"


class TinyShapeSettings(RewardSettings):
    kind: Literal["tiny_shape"] = "tiny_shape"
    floor: float = Field(-4.0, lt=0, description="log-probabilities are clamped here")


class ShapeNet(nn.Sequential):
    """[B, 3, 32, 32] in [0, 1] -> logits [B, 3] over circle, square, triangle."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(32, len(world.SHAPES)),
        )


class TinyShape(Reward):
    Settings = TinyShapeSettings
    differentiable = True

    def __init__(self, settings: TinyShapeSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        net = ShapeNet()
        net.load_state_dict(load_file(WEIGHTS))
        self.net = net.float().to(device).eval().requires_grad_(False)

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        shape_B = torch.tensor([world.parse(p)[2] for p in prompts], device=images_B3HW.device)
        log_probability = self.net(images_B3HW).log_softmax(-1)
        values = log_probability.gather(1, shape_B[:, None])[:, 0].clamp(min=self.settings.floor)
        return values

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        world.parse(prompt)


PLUGIN = TinyShape

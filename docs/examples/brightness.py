"""A reward: how near a picture's mean is to a brightness that the prompt or the recipe asks for."""

import torch
from pydantic import Field

from gardo.rewards.base import Reward, RewardSettings


class BrightnessSettings(RewardSettings):
    wanted: float = Field(0.5, ge=0, le=1, description="the mean of a picture, black 0, white 1")


class Brightness(Reward):
    Settings = BrightnessSettings
    differentiable = True  # its value has a gradient with respect to the pictures: ReFL may use it

    def score(self, images_B3HW, prompts):
        """Minus the distance to what is asked, fp32 [B]; NaN would be masked, never a zero."""
        wanted = [prompt.metadata.get("brightness", self.settings.wanted) for prompt in prompts]
        wanted_B = torch.tensor(wanted, device=images_B3HW.device)
        return -(images_B3HW.mean((1, 2, 3)) - wanted_B).abs()

    @classmethod
    def check_prompt(cls, prompt):
        """ValueError where a prompt asks for what cannot be; before anything loads."""
        if not 0 <= prompt.metadata.get("brightness", 0.5) <= 1:
            raise ValueError(f"{prompt!r}: brightness must lie in [0, 1]")

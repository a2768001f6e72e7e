"""What the rewards of the tiny world share: their prompts are its captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from gardo.rewards.base import Reward, RewardSettings
from gardo.tiny import world
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor


class TinySettings(RewardSettings):
    batch: int = Field(256, ge=1, description="images that are scored at once")


class TinyReward(Reward):
    """Each has its own `values`, the scores of one batch."""

    def values(self, images_B3HW: Tensor, asked: world.Asked) -> Tensor:
        raise NotImplementedError  # pragma: no cover

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        parts, start = [], 0
        for images in images_B3HW.split(self.settings.batch):
            texts = prompts[start : start + len(images)]
            parts.append(self.values(images, world.asked(texts, images.device)))
            start += len(images)
        return torch.cat(parts)

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        world.parse(prompt)

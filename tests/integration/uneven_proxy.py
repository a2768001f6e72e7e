"""A proxy that cannot tell some groups' images apart, as OCR and GenEval often cannot.

Of circles the brighter pictures are worth more; all others are worth the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gardo.rewards.base import Reward, RewardSettings
from gardo.types import Prompt


class Uneven(Reward):
    Settings = RewardSettings

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        circle_B = torch.tensor(["circle" in p for p in prompts], device=images_B3HW.device)
        return torch.where(circle_B, images_B3HW.mean((1, 2, 3)), 0.5)

"""A proxy that cannot tell some groups' images apart, as OCR and GenEval often cannot.

Of circles the brighter pictures are worth more; all others are worth the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gardo.rewards.base import Reward, RewardSettings


class Uneven(Reward):
    Settings = RewardSettings

    def score(
        self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        circle_B = torch.tensor(["circle" in p for p in prompts], device=images_B3HW.device)
        values = torch.where(circle_B, images_B3HW.mean((1, 2, 3)), 0.5)
        return values, torch.ones_like(circle_B)

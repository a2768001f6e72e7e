"""Palette purity, on pixels: the share of the coloured pixels that have the prompt's colour.

A gate reads it; no gradient is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gardo.rewards._tiny import TinyReward
from gardo.rewards.base import RewardSettings
from gardo.tiny import world
from gardo.types import Prompt


class TinyPuritySettings(RewardSettings):
    kind: Literal["tiny_purity"] = "tiny_purity"


class TinyPurity(TinyReward):
    Settings = TinyPuritySettings

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        hue_B = world.asked(prompts, images_B3HW.device).hue_B
        hue, saturation, value = world.rgb_to_hsv(images_B3HW)
        coloured = saturation * value  # how much of a colour the pixel shows
        coloured = torch.where(coloured > 0.2, coloured, torch.zeros_like(coloured))
        pure = coloured * (world.hue_distance(hue, hue_B[:, None, None]) < 0.06)
        total = coloured.sum((1, 2))
        return torch.where(total > 0, pure.sum((1, 2)) / total.clamp(min=1e-6), 0.0 * total)


PLUGIN = TinyPurity

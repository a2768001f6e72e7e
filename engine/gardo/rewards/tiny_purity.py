"""Palette purity, on pixels: the share of the coloured pixels that have the prompt's colour.

A gate reads it; no gradient is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from gardo.rewards._tiny import TinyReward, TinySettings
from gardo.rewards.base import About
from gardo.tiny import world

if TYPE_CHECKING:
    from torch import Tensor


class TinyPuritySettings(TinySettings):
    kind: Literal["tiny_purity"] = "tiny_purity"


class TinyPurity(TinyReward):
    Settings = TinyPuritySettings
    about = About("share of coloured pixels in the colour", "0 to 1", verified="in full")

    def values(self, images_B3HW: Tensor, asked: world.Asked) -> Tensor:
        hue_B = asked.hue_B
        hue, saturation, value = world.rgb_to_hsv(images_B3HW)
        coloured = saturation * value  # how much of a colour the pixel shows
        coloured = torch.where(coloured > 0.2, coloured, torch.zeros_like(coloured))
        pure = coloured * (world.hue_distance(hue, hue_B[:, None, None]) < 0.06)
        total = coloured.sum((1, 2))
        return torch.where(total > 0, pure.sum((1, 2)) / total.clamp(min=1e-6), 0.0 * total)


PLUGIN = TinyPurity

"""Counting for real, on pixels: how many connected patches of the prompt's colour are there?

score = 1 / (1 + |patches - asked|): 1 when exact. Any patch of `min_pixels` pixels counts, whatever
its shape, so specks would earn as much as circles do. Reported beside the counter that is optimised
(tiny_count), which does not look at patches at all.

Shapes: B images of H x W pixels.
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


class TinyPatchesSettings(TinySettings):
    kind: Literal["tiny_patches"] = "tiny_patches"
    min_pixels: int = Field(4, ge=1, description="smaller patches do not count")


def colour_mask(images_B3HW: Tensor, hue_B: Tensor) -> Tensor:
    """bool [B, H, W]: bright, saturated pixels within 1/12 of the colour circle of the hue."""
    hue, saturation, value = world.rgb_to_hsv(images_B3HW)
    near = world.hue_distance(hue, hue_B[:, None, None]) < 1 / 12
    return near & (saturation > 0.5) & (value > 0.45)


def count_patches(mask_BHW: Tensor, min_pixels: int) -> Tensor:
    """int64 [B]: 8-connected patches of at least `min_pixels` pixels.

    By spreading the largest label of each patch until nothing changes.
    """
    batch, height, width = mask_BHW.shape
    index = torch.arange(1, height * width + 1, device=mask_BHW.device, dtype=torch.float32)
    mask = mask_BHW[:, None].float()
    label = index.view(1, 1, height, width) * mask
    while True:
        spread = torch.nn.functional.max_pool2d(label, 3, 1, 1) * mask
        if torch.equal(spread, label):
            break
        label = spread
    area = torch.zeros(batch, height * width + 1, dtype=torch.int64, device=mask_BHW.device)
    flat = label.flatten(1).long()
    area.scatter_add_(1, flat, torch.ones_like(flat))
    return (area[:, 1:] >= min_pixels).sum(1)


class TinyPatches(TinyReward):
    Settings = TinyPatchesSettings
    about = About("1 / (1 + |patches - asked|)", "0 to 1", verified="in full")

    def values(self, images_B3HW: Tensor, asked: world.Asked) -> Tensor:
        found_B = count_patches(colour_mask(images_B3HW, asked.hue_B), self.settings.min_pixels)
        return 1.0 / (1.0 + (found_B - asked.count_B).abs())


PLUGIN = TinyPatches

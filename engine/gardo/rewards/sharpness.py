"""Sharpness: the variance of the Laplacian of luma. Differentiable.

    luma  = 0.299 R + 0.587 G + 0.114 B                       (BT.601)
                    0   1   0
    value = var(    1  -4   1    * luma )                     population variance over the pixels
                    0   1   0

The kernel meets only pixels that have all four neighbours: no border is made up. Images are in
[0, 1], so values lie in [0, 16]: about 1e-4 where a picture is blurred, above 0.01 where it is full
of edges, or of noise, which this takes for sharp. OpenCV's usual number on 8-bit pictures is
255^2 times it. The prompt is not looked at.

Shapes: B images of H x W pixels, H and W at least 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from gardo.rewards._pixels import luma
from gardo.rewards.base import About, Reward, RewardSettings
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor


class SharpnessSettings(RewardSettings):
    kind: Literal["sharpness"] = "sharpness"
    batch: int = Field(256, ge=1, description="images that are scored at once")


def laplacian(luma_BHW: Tensor) -> Tensor:
    """[B, H - 2, W - 2]: the four neighbours' sum, less four times the pixel."""
    middle = luma_BHW[:, 1:-1, 1:-1]
    beside = luma_BHW[:, 1:-1, :-2] + luma_BHW[:, 1:-1, 2:]
    above = luma_BHW[:, :-2, 1:-1] + luma_BHW[:, 2:, 1:-1]
    return beside + above - 4 * middle


class Sharpness(Reward):
    Settings = SharpnessSettings
    about = About("variance of the Laplacian of luma", "1e-4 to 0.05", verified="in full")
    differentiable = True

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        parts = images_B3HW.float().split(self.settings.batch)
        return torch.cat([laplacian(luma(part)).var((1, 2), correction=0) for part in parts])


PLUGIN = Sharpness

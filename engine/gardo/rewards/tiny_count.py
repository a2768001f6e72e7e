"""Counting by coloured area: a proxy that can be cheated.

    found = sum over pixels of saturation x value x exp(-(hue distance / 0.08)^2) / object area
    score = max(0, 1 - |found - asked| / asked)

A quick counter that looks at no object: one blob of three objects' area counts as three, and so do
bleeding colour, stripes and smears. It is smooth in the pixels, so a policy finds that out fast.
With `object_area` above 1 it is calibrated wrongly, too: objects pay that are larger than any good
picture's, and then blobs.

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

# Mean coloured area of one object of the world, in pixels (measured by a test of it)
OBJECT_AREA = {"circle": 57.0, "square": 53.0, "triangle": 40.0}


class TinyCountSettings(TinySettings):
    kind: Literal["tiny_count"] = "tiny_count"
    object_area: float = Field(
        1.0,
        gt=0,
        description="of what counts as one object, against the mean object's; above 1.6 it asks "
        "for more colour than the largest objects have",
    )


def coloured_area(images_B3HW: Tensor, hue_B: Tensor) -> Tensor:
    """fp32 [B]: pixels of a hue, each weighted by how strongly it shows it."""
    hue, saturation, value = world.rgb_to_hsv(images_B3HW)
    near = torch.exp(-((world.hue_distance(hue, hue_B[:, None, None]) / 0.08) ** 2))
    return (saturation * value * near).sum((1, 2))


class TinyCount(TinyReward):
    Settings = TinyCountSettings
    about = About("max(0, 1 - |area in objects - asked| / asked)", "0 to 1", verified="in full")

    def values(self, images_B3HW: Tensor, asked: world.Asked) -> Tensor:
        areas = torch.tensor([OBJECT_AREA[s] for s in world.SHAPES], device=images_B3HW.device)
        area_B = areas[asked.shape_B] * self.settings.object_area
        found_B = coloured_area(images_B3HW, asked.hue_B) / area_B
        return (1 - (found_B - asked.count_B).abs() / asked.count_B).clamp(min=0)


PLUGIN = TinyCount

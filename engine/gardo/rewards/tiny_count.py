"""Counting by coloured area: a proxy that can be cheated.

    found = sum over pixels of saturation x value x exp(-(hue distance / 0.08)^2) / object area
    score = max(0, 1 - |found - asked| / asked)

A quick counter that looks at no object: one blob of three objects' area counts as three, and so do
bleeding colour, stripes and smears. It is smooth in the pixels, so a policy finds that out fast.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gardo.rewards.base import Reward, RewardSettings
from gardo.tiny import world
from gardo.types import Prompt

# Mean coloured area of one object of the world, in pixels (measured by a test of it)
OBJECT_AREA = {"circle": 57.0, "square": 53.0, "triangle": 40.0}


class TinyCountSettings(RewardSettings):
    kind: Literal["tiny_count"] = "tiny_count"


def coloured_area(images_B3HW: Tensor, hue_B: Tensor) -> Tensor:
    """fp32 [B]: pixels of a hue, each weighted by how strongly it shows it."""
    hue, saturation, value = world.rgb_to_hsv(images_B3HW)
    near = torch.exp(-((world.hue_distance(hue, hue_B[:, None, None]) / 0.08) ** 2))
    return (saturation * value * near).sum((1, 2))


class TinyCount(Reward):
    Settings = TinyCountSettings

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        asked = [world.parse(p) for p in prompts]
        device = images_B3HW.device
        hues = torch.tensor(list(world.HUES.values()), device=device)
        areas = torch.tensor([OBJECT_AREA[shape] for shape in world.SHAPES], device=device)
        asked_B = torch.tensor([float(count) for count, _, _ in asked], device=device)
        hue_B = hues[[colour for _, colour, _ in asked]]
        found_B = coloured_area(images_B3HW, hue_B) / areas[[shape for _, _, shape in asked]]
        values = (1 - (found_B - asked_B).abs() / asked_B).clamp(min=0)
        return values

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        world.parse(prompt)


PLUGIN = TinyCount

"""Diversity of the tiny world, told from pixels: the entropy of decoded layout, size and hue.

Not the features that are rewarded.

Shapes: B pictures of 32 x 32 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from gardo.tiny import world

if TYPE_CHECKING:
    from torch import Tensor


def check_prompt(prompt: str) -> None:
    """ValueError where it is not of the tiny world."""
    try:
        world.parse(prompt)
    except ValueError as error:
        raise ValueError(
            f"attributes reads prompts of the tiny world only: {error}; use features or none"
        ) from None


def attribute_labels(images_B3HW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """int64 [B] labels.

    `layout`: which cells of a 3 x 3 grid are occupied. `size`: coloured area an object, in steps of
    12 pixels. `hue`: mean deviation from the prompt's hue, in steps of 1/100 of the colour circle.
    """
    asked = [world.parse(p) for p in prompts]
    device = images_B3HW.device
    count_B = torch.tensor([n for n, _, _ in asked], device=device)
    hue_B = torch.tensor(list(world.HUES.values()), device=device)[[c for _, c, _ in asked]]
    hue, saturation, value = world.rgb_to_hsv(images_B3HW)
    object_BHW = (value > 0.35).float()
    cells_B9 = torch.nn.functional.adaptive_avg_pool2d(object_BHW[:, None], 3).flatten(1) > 0.12
    layout_B = (cells_B9.long() << torch.arange(9, device=device)).sum(1)
    area_B = object_BHW.sum((1, 2))
    weight = object_BHW * saturation
    deviation = (hue - hue_B[:, None, None] + 0.5) % 1.0 - 0.5
    mean_hue_B = (deviation * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)
    return {
        "layout": layout_B,
        "size": (area_B / count_B / 12).long(),
        "hue": (mean_hue_B * 100).round().long(),
    }

"""One number about a picture's colours, whatever the prompt. Differentiable.

    statistic: colourfulness   |std(rg), std(yb)| + 0.3 |mean(rg), mean(yb)|
                               rg = R - G, yb = (R + G) / 2 - B, in 8-bit units
    statistic: saturation      mean of (max - min) / max over R, G, B; 0 where a pixel is black
    statistic: contrast        std of luma (BT.601), which is RMS contrast

Colourfulness is Hasler and Suesstrunk's (2003, "Measuring colourfulness in natural images"); their
scale: 0 not colourful, 15 slightly, 33 moderately, 45 averagely, 59 quite, 82 highly, 109
extremely. Saturation lies in [0, 1], contrast in [0, 0.5]. Deviations are those of the population.

    rewards:
      colour_statistics: {role: held_out, statistic: saturation}

Shapes: B images of H x W pixels.
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


class ColourStatisticsSettings(RewardSettings):
    kind: Literal["colour_statistics"] = "colour_statistics"
    statistic: Literal["colourfulness", "saturation", "contrast"] = Field(
        "colourfulness",
        description="Hasler and Suesstrunk's colourfulness, mean saturation of HSV, or std of luma",
    )
    batch: int = Field(256, ge=1, description="images that are scored at once")


def _root(square: Tensor) -> Tensor:
    """The square root; its slope at 0, which has none, is 0."""
    positive = square > 0
    return torch.where(positive, square.where(positive, 1.0).sqrt(), 0.0 * square)


def colourfulness(images_B3HW: Tensor) -> Tensor:
    red, green, blue = (255 * images_B3HW).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    variance_B = opponents.var((2, 3), correction=0).sum(0)
    mean_B = opponents.mean((2, 3)).square().sum(0)
    return _root(variance_B) + 0.3 * _root(mean_B)


def saturation(images_B3HW: Tensor) -> Tensor:
    most, least = images_B3HW.amax(1), images_B3HW.amin(1)
    lit = most != 0  # NaN stays NaN
    return torch.where(lit, (most - least) / most.where(lit, 1.0), 0.0).mean((1, 2))


def contrast(images_B3HW: Tensor) -> Tensor:
    return _root(luma(images_B3HW).var((1, 2), correction=0))


STATISTICS = {"colourfulness": colourfulness, "saturation": saturation, "contrast": contrast}


class ColourStatistics(Reward):
    Settings = ColourStatisticsSettings
    about = About(
        "colourfulness (Hasler and Suesstrunk), mean saturation, or contrast (std of luma)",
        "0 to 100, 0 to 1, 0 to 0.5",
        verified="in full",
    )
    differentiable = True

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        of = STATISTICS[self.settings.statistic]
        return torch.cat([of(part) for part in images_B3HW.float().split(self.settings.batch)])


PLUGIN = ColourStatistics

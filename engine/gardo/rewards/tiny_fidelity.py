"""Held-out quality of a picture: the probability that it shows what the prompt names.

That is, the prompt's shape in the prompt's colour, and nothing else; the count is not judged. A
transformer over patches, unlike the convolutional judge that a recipe may gate with, trained on
noised and blurred pictures and on a rejected class: mixed objects, combs of dots, torn and smeared
objects, blobs, noise. The net: gardo/tiny/judges.py. Never optimised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from gardo.lazily import no_grad
from gardo.rewards._tiny import TinyReward, TinySettings
from gardo.rewards.base import About
from gardo.tiny import world

if TYPE_CHECKING:
    from torch import Tensor


class TinyFidelitySettings(TinySettings):
    kind: Literal["tiny_fidelity"] = "tiny_fidelity"


class TinyFidelity(TinyReward):
    Settings = TinyFidelitySettings
    about = About("P(shape in its colour and nothing else)", "0 to 1", verified="in full")

    def __init__(self, settings: TinyFidelitySettings, device: torch.device) -> None:
        super().__init__(settings, device)
        from gardo.tiny.judges import fidelity_judge

        self.net = fidelity_judge(device)

    @no_grad
    def values(self, images_B3HW: Tensor, asked: world.Asked) -> Tensor:
        class_B = asked.colour_B * len(world.SHAPES) + asked.shape_B
        return self.net(images_B3HW).softmax(-1).gather(1, class_B[:, None])[:, 0]


PLUGIN = TinyFidelity

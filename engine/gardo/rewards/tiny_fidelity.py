"""Held-out quality of a picture: the probability that it shows what the prompt names.

That is, the prompt's shape in the prompt's colour, and nothing else; the count is not judged. A
transformer over patches, unlike the convolutional judge that a recipe may gate with, trained on
noised and blurred pictures and on a rejected class: mixed objects, combs of dots, torn and smeared
objects, blobs, noise. Never optimised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gardo.rewards.base import Reward, RewardSettings
from gardo.tiny import world
from gardo.types import Prompt

WEIGHTS = Path(__file__).parents[1] / "tiny" / "weights" / "judges" / "fidelity.safetensors"
REJECTED = len(world.COLOURS) * len(world.SHAPES)


class TinyFidelitySettings(RewardSettings):
    kind: Literal["tiny_fidelity"] = "tiny_fidelity"


class FidelityNet(nn.Module):
    """[B, 3, 32, 32] in [0, 1] -> logits [B, 19]: colour x shape, and rejected."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * 4 * 4, width)
        self.place = nn.Parameter(torch.zeros(64, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(3)
        )
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, REJECTED + 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        patches = nn.functional.unfold(images_B3HW * 2 - 1, 4, stride=4).transpose(1, 2)
        hidden = self.patch(patches) + self.place
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(torch.cat([hidden.mean(1), hidden.amax(1)], -1))


class TinyFidelity(Reward):
    Settings = TinyFidelitySettings

    def __init__(self, settings: TinyFidelitySettings, device: torch.device) -> None:
        super().__init__(settings, device)
        net = FidelityNet()
        net.load_state_dict(load_file(WEIGHTS))
        self.net = net.float().to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        wanted = [
            colour * len(world.SHAPES) + shape for _, colour, shape in map(world.parse, prompts)
        ]
        index_B1 = torch.tensor(wanted, device=images_B3HW.device)[:, None]
        values = self.net(images_B3HW).softmax(-1).gather(1, index_B1)[:, 0]
        return values

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        world.parse(prompt)


PLUGIN = TinyFidelity

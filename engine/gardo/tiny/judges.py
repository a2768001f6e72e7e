"""The nets of the tiny world's judges, and what make.py trained them to.

Shapes: B pictures of 32 x 32 pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gardo.settings import BUILTIN
from gardo.tiny import world

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = BUILTIN / "judges"
SHAPE, FIDELITY = FOLDER / "shape.safetensors", FOLDER / "fidelity.safetensors"
REJECTED = len(world.COLOURS) * len(world.SHAPES)  # the class after all colours and shapes


class ShapeNet(nn.Sequential):
    """[B, 3, 32, 32] in [0, 1] -> logits [B, 3] over circle, square, triangle."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(32, len(world.SHAPES)),
        )


class FidelityNet(nn.Module):
    """[B, 3, 32, 32] in [0, 1] -> logits [B, 19]: colour x shape, and rejected."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=4, padding=2)  # overlapping
        self.place = nn.Parameter(torch.zeros(64, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(3)
        )
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, REJECTED + 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        hidden = self.patch(images_B3HW * 2 - 1).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(torch.cat([hidden.mean(1), hidden.amax(1)], -1))


def shape_judge(device: torch.device) -> nn.Module:
    return _trained(ShapeNet(), SHAPE, device)


def fidelity_judge(device: torch.device) -> nn.Module:
    return _trained(FidelityNet(), FIDELITY, device)


def _trained(net: nn.Module, path: Any, device: torch.device) -> nn.Module:
    """The net with its weights, stored in bf16, for use alone in fp32."""

    from safetensors.torch import load_file

    net.load_state_dict(load_file(path))
    return net.float().to(device).eval().requires_grad_(False)

"""DINOv3 features for diversity: the mean of the patch tokens after the final norm.

That is GARDO's released definition. Pictures are resized to `size` (bicubic, antialiased) and
normalised with ImageNet's statistics. The class token and the registers are left out; the model's
own pooler returns the class token, which is another feature.

Shapes: B images, D the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import DINOv3ViTModel

from gardo.rewards._loading import ModelFolder, frozen, load_model
from gardo.rewards._pixels import IMAGENET, normalised, resized
from gardo.rewards.base import Holds, Reward, RewardSettings
from gardo.types import Prompt


class Dinov3Settings(RewardSettings):
    kind: Literal["dinov3"] = "dinov3"
    role: Literal["features"] = "features"
    path: Annotated[ModelFolder, Holds("DINOv3ViTModel")] = Field(
        "facebook/dinov3-vitl16-pretrain-lvd1689m", description="hub id or folder"
    )
    size: int = Field(256, ge=8, description="pixels a side; a multiple of the patch size")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the model; features are float32"
    )


def preprocess(images_B3HW: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> normalised [B, 3, size, size]."""
    return normalised(resized(images_B3HW, size, size), IMAGENET)


class Dinov3(Reward):
    Settings = Dinov3Settings
    gives_features = True

    def __init__(self, settings: Dinov3Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        model = load_model(DINOv3ViTModel, settings.path, exact=True)
        self.model = frozen(model, settings.dtype, device)

    @torch.no_grad()
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = preprocess(images_B3HW.to(self.device), self.settings.size).to(self.model.dtype)
        first = 1 + self.model.config.num_register_tokens
        return self.model(pixels).last_hidden_state[:, first:].float().mean(1)


PLUGIN = Dinov3

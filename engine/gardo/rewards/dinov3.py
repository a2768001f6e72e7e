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

from gardo.rewards._files import ModelFolder, ModelRewardSettings
from gardo.rewards._loading import frozen, load_model
from gardo.rewards._pixels import IMAGENET, normalised, resized
from gardo.rewards.base import About, Holds, Reward
from gardo.types import Prompt


class Dinov3Settings(ModelRewardSettings):
    kind: Literal["dinov3"] = "dinov3"
    role: Literal["features"] = "features"
    path: Annotated[ModelFolder, Holds("DINOv3ViTModel")] = Field(
        "facebook/dinov3-vitl16-pretrain-lvd1689m", description="hub id or folder"
    )
    size: int = Field(256, ge=8, le=8192, description="pixels a side; a multiple of the patch size")
    batch: int = Field(64, ge=1, description="images that the model sees at once")


def preprocess(images_B3HW: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> normalised [B, 3, size, size]."""
    return normalised(resized(images_B3HW, size, size), IMAGENET)


class Dinov3(Reward):
    Settings = Dinov3Settings
    about = About("mean of the patch tokens", "features", "DINOv3 License, gated")
    gives_features = True

    def __init__(self, settings: Dinov3Settings, device: torch.device) -> None:
        from transformers import DINOv3ViTModel

        super().__init__(settings, device)
        model = load_model(DINOv3ViTModel, settings.path, settings.revision, exact=True)
        self.model = frozen(model, settings.dtype, device)

    @torch.no_grad()
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.cat([self._features(part) for part in images_B3HW.split(self.settings.batch)])

    def _features(self, images_B3HW: Tensor) -> Tensor:
        """fp32 [B, D]."""
        pixels = preprocess(images_B3HW.to(self.device), self.settings.size).to(self.model.dtype)
        first = 1 + self.model.config.num_register_tokens
        return self.model(pixels).last_hidden_state[:, first:].float().mean(1)


PLUGIN = Dinov3

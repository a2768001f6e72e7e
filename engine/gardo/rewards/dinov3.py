"""DINOv3 features for diversity: the mean of the patch tokens after the final norm.

That is GARDO's released definition. Pictures are resized to `size` (bicubic, antialiased) and
normalised with ImageNet's statistics. The class token and the registers are left out; the model's
own pooler returns the class token, which is another feature.

Shapes: B images, D the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor
from transformers import DINOv3ViTModel

from gardo.rewards._loading import filled_model
from gardo.rewards.base import Reward, RewardSettings
from gardo.settings import is_hub_id, model_path
from gardo.types import Prompt

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Dinov3Settings(RewardSettings):
    kind: Literal["dinov3"] = "dinov3"
    role: Literal["features"] = "features"
    path: str = Field("facebook/dinov3-vitl16-pretrain-lvd1689m", description="hub id or folder")
    size: int = Field(256, ge=8, description="pixels a side; a multiple of the patch size")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the model; features are float32"
    )

    @field_validator("path")
    @classmethod
    def _exists(cls, value: str) -> str:
        if not is_hub_id(value) and not (Path(model_path(value)) / "config.json").is_file():
            raise ValueError(
                f"no DINOv3 folder (with config.json): {value!r}; give one, or a hub id owner/name"
            )
        return value


def preprocess(images_B3HW: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> normalised [B, 3, size, size]."""
    if images_B3HW.shape[-2:] != (size, size):
        images_B3HW = F.interpolate(
            images_B3HW, (size, size), mode="bicubic", antialias=True
        ).clamp(0, 1)
    mean = images_B3HW.new_tensor(MEAN)[:, None, None]
    std = images_B3HW.new_tensor(STD)[:, None, None]
    return (images_B3HW - mean) / std


class Dinov3(Reward):
    Settings = Dinov3Settings
    gives_features = True

    def __init__(self, settings: Dinov3Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        model = filled_model(
            DINOv3ViTModel,
            f"path: {settings.path!r}",
            model_path(settings.path),
            exact=True,
            use_safetensors=True,
        )
        self.model = model.to(device, getattr(torch, settings.dtype)).eval()

    @torch.no_grad()
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = preprocess(images_B3HW.to(self.device), self.settings.size).to(self.model.dtype)
        first = 1 + self.model.config.num_register_tokens
        return self.model(pixels).last_hidden_state[:, first:].float().mean(1)


PLUGIN = Dinov3

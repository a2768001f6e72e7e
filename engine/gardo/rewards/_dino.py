"""What the DINO features share: the mean of the patch tokens after the final norm.

Pictures are resized to `size` (bicubic, antialiased) and normalised with ImageNet's statistics. The
class token and the registers are left out; the models' own pooler returns the class token, which is
another feature.

Shapes: B images, D the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from gardo.lazily import no_grad
from gardo.rewards._files import ModelRewardSettings
from gardo.rewards._loading import frozen, load_model
from gardo.rewards._pixels import IMAGENET, normalised, resized
from gardo.rewards.base import Reward, weights_of
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor


class DinoSettings(ModelRewardSettings):
    """`path` and `size` are those of each."""

    batch: int = Field(64, ge=1, description="images that the model sees at once")


def preprocess(images_B3HW: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> normalised [B, 3, size, size]."""
    return normalised(resized(images_B3HW, size, size), IMAGENET)


class Dino(Reward):
    """Features of a `model_class` of transformers."""

    gives_features = True
    model_class: ClassVar[str]

    def __init__(self, settings: Any, device: torch.device) -> None:
        import transformers

        super().__init__(settings, device)
        model = load_model(
            getattr(transformers, self.model_class), settings.path, settings.revision, exact=True
        )
        patch = model.config.patch_size
        if settings.size % patch:
            raise ValueError(
                f"size: {settings.size}: is no multiple of the model's patches of {patch} pixels; "
                f"use {max(1, settings.size // patch) * patch}"
            )
        self.model = frozen(model, settings.dtype, device, weights_of(settings, "path"))

    @no_grad
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.features(images_B3HW)

    def features(self, images_B3HW: Tensor) -> Tensor:
        """fp32 [B, D]; gradients reach the images, if they want any."""
        return torch.cat([self._features(part) for part in images_B3HW.split(self.settings.batch)])

    def _features(self, images_B3HW: Tensor) -> Tensor:
        """fp32 [B, D]."""
        pixels = preprocess(images_B3HW.to(self.device), self.settings.size).to(self.model.dtype)
        first = 1 + getattr(self.model.config, "num_register_tokens", 0)
        return self.model(pixels).last_hidden_state[:, first:].float().mean(1)

"""The features that a fitted reward's heads see, by the rewards that have the models.

    dinov3, dinov2   mean patch token of the picture (_dino.py); the prompt is not looked at
    clip             [image, image * text]: CLIP's projected features of length 1, and their
                     product number by number, whose sum is the cosine: a linear head on it is a
                     weighted cosine, so what it says of a picture depends on its prompt

Gradients reach the pictures through all of them.

Shapes: B images, W the width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from gardo import plugins
from gardo.rewards._files import ModelRewardSettings
from gardo.rewards.base import Reward
from gardo.settings import config_folder, read_object
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

Name = Literal["dinov3", "dinov2", "clip"]


def _dino(reward: Any, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return reward.features(images_B3HW)


def _clip(reward: Any, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    image_BE = reward.clip.image_features(images_B3HW)
    text_BE = reward.clip.text_features(prompts)
    return torch.cat([image_BE, image_BE * text_BE], -1)


@dataclass(frozen=True)
class HeadFeatures:
    """`kind` is the reward with the model; `of` (that reward, images, prompts) -> fp32 [B, W]."""

    kind: str
    width_field: str  # of the model's configuration
    parts: int  # of the features, each so wide
    of: Callable[[Any, Tensor, Sequence[Prompt]], Tensor]
    model: Callable[[Any], Any]

    @property
    def plugin(self) -> Any:
        return plugins.resolve("gardo.rewards", self.kind)

    def settings(self, **fields: Any) -> ModelRewardSettings:
        """Of the reward with the model; fields that are None are left out."""
        given = {name: value for name, value in fields.items() if value is not None}
        found: ModelRewardSettings = self.plugin.Settings(role="features", **given)
        return found

    def width(self, reward: Reward) -> int:
        return self.parts * int(getattr(self.model(reward).config, self.width_field))

    def width_said(self, path: str) -> int | None:
        """What the configuration in a folder, or the one that ships for a hub id, says."""
        folder = config_folder(path)
        found = read_object(folder / "config.json").get(self.width_field) if folder else None
        return self.parts * found if isinstance(found, int) else None


FEATURES: dict[str, HeadFeatures] = {
    "dinov3": HeadFeatures("dinov3", "hidden_size", 1, _dino, lambda reward: reward.model),
    "dinov2": HeadFeatures("dinov2", "hidden_size", 1, _dino, lambda reward: reward.model),
    "clip": HeadFeatures("clipscore", "projection_dim", 2, _clip, lambda r: r.clip.model),
}

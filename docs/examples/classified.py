"""A reward with a model: the log-probability that a frozen ViT classifier gives one label."""

import torch
from pydantic import Field

from gardo.lazily import no_grad
from gardo.rewards._files import ModelFolder, ModelRewardSettings
from gardo.rewards._loading import frozen, load_model
from gardo.rewards._pixels import resized
from gardo.rewards.base import Reward


class ClassifiedSettings(ModelRewardSettings):  # which has revision, batch and dtype
    path: ModelFolder = Field(description="hub id or folder of a ViTForImageClassification")
    label: str = Field(description="which label, by its name in the model's config.json")


class Classified(Reward):
    Settings = ClassifiedSettings

    def __init__(self, settings, device):
        from transformers import ViTForImageClassification  # a recipe is checked without it

        super().__init__(settings, device)
        model = load_model(ViTForImageClassification, settings.path, settings.revision)
        labels = model.config.label2id
        if settings.label not in labels:
            raise ValueError(f"label: {settings.label!r} is none of {', '.join(labels)}")
        self.label, self.size = labels[settings.label], model.config.image_size
        self.model = frozen(model, settings.dtype, device)

    def score(self, images_B3HW, prompts):
        """So many pictures at a time as `batch` says."""
        parts = images_B3HW.to(self.device).split(self.settings.batch)
        return torch.cat([self._values(part) for part in parts])

    @no_grad
    def _values(self, images_B3HW):
        """fp32 [B]; pixels in [-1, 1] are what Google's ViTs were trained on."""
        pixels_B3HW = 2 * resized(images_B3HW, self.size, self.size, "bilinear") - 1
        logits_BC = self.model(pixels_B3HW.to(self.model.dtype)).logits.float()
        return logits_BC.log_softmax(1)[:, self.label]

"""CLIPScore: how well an image fits its prompt, by OpenAI's CLIP ViT-L/14.

    score = 100 cos(image, prompt) / 30

100 is the model's own exp(logit_scale), the division by 30 Flow-GRPO's; usual values are about 0.5
to 1.2. Differentiable. (The paper of that name, arXiv 2104.08718, takes 2.5 max(cos, 0) of the
ViT-B/32.)

Weights and tokenizer: openai/clip-vit-large-patch14. Preprocessing clip-crop-1 (_pixels.py). Not
verified against the published weights yet: the tests compare tiny random models of the same class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel

from gardo.rewards._clip import Clip, ClipSettings
from gardo.rewards._loading import ModelFolder, load_model
from gardo.rewards.base import Reward
from gardo.types import Prompt

SCALE = 100
DIVISOR = 30


class ClipScoreSettings(ClipSettings):
    kind: Literal["clipscore"] = "clipscore"
    path: ModelFolder = Field("openai/clip-vit-large-patch14", description="hub id or folder")


class ClipScore(Reward):
    Settings = ClipScoreSettings
    models = {"path": "CLIPModel"}
    differentiable = True

    def __init__(self, settings: ClipScoreSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        model = load_model(CLIPModel, settings.path, settings.revision)
        self.clip = Clip(
            model, settings.path, settings, device, tokenizer_revision=settings.revision
        )

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return SCALE / DIVISOR * self.clip.cosine(images_B3HW, prompts)


PLUGIN = ClipScore

"""PickScore (arXiv 2305.01569): a CLIP ViT-H/14 trained on which of two images people picked.

    score = exp(logit_scale) cos(image, prompt) / 26

The published logit_scale is near ln 100. Raw scores lie around 20 to 23; the division by 26 is
Flow-GRPO's and brings them to about 0.8 to 0.9. Differentiable.

Weights: yuvalkirstain/PickScore_v1; its tokenizer is the one of laion's ViT-H/14. Preprocessing
clip-crop-1 (_pixels.py). Not verified against the published weights yet: the tests compare tiny
random models of the same class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel

from gardo.rewards._clip import LAION_H14, Clip, ClipSettings
from gardo.rewards._loading import ModelFolder, TokenizerFolder, load_model
from gardo.rewards.base import Reward
from gardo.types import Prompt

DIVISOR = 26


class PickScoreSettings(ClipSettings):
    kind: Literal["pickscore"] = "pickscore"
    path: ModelFolder = Field("yuvalkirstain/PickScore_v1", description="hub id or folder")
    tokenizer: TokenizerFolder = Field(LAION_H14, description="hub id or folder of the tokenizer")


class PickScore(Reward):
    Settings = PickScoreSettings
    models = {"path": "CLIPModel"}
    differentiable = True

    def __init__(self, settings: PickScoreSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        model = load_model(CLIPModel, settings.path, settings.revision)
        self.clip = Clip(model, settings.tokenizer, settings, device)

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.clip.scale / DIVISOR * self.clip.cosine(images_B3HW, prompts)


PLUGIN = PickScore

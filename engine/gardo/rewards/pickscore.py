"""PickScore (arXiv 2305.01569): a CLIP ViT-H/14 trained on which of two images people picked.

    score = exp(logit_scale) cos(image, prompt) / 26

The published logit_scale is near ln 100. Raw scores lie around 20 to 23; the division by 26 is
Flow-GRPO's and brings them to about 0.8 to 0.9. Differentiable.

Weights: yuvalkirstain/PickScore_v1; its tokenizer is the one of laion's ViT-H/14. Preprocessing
clip-crop-1 (_pixels.py). Not verified against the published weights yet: the tests compare tiny
random models of the same class.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gardo.rewards._clip import LAION_H14, Clip, ClipReward
from gardo.rewards._files import ModelFolder, ModelRewardSettings, TokenizerFolder
from gardo.rewards._loading import load_model
from gardo.rewards.base import About, Holds, weights_of

DIVISOR = 26


class PickScoreSettings(ModelRewardSettings):
    kind: Literal["pickscore"] = "pickscore"
    path: Annotated[ModelFolder, Holds("CLIPModel")] = Field(
        "yuvalkirstain/PickScore_v1", description="hub id or folder"
    )
    tokenizer: TokenizerFolder = Field(LAION_H14, description="hub id or folder of the tokenizer")
    tokenizer_revision: str | None = Field(None, description="of `tokenizer` on the hub")


class PickScore(ClipReward):
    Settings = PickScoreSettings
    about = About("exp(logit_scale) cos(image, prompt) / 26", "0.8 to 0.9", "see its page")

    def load(self) -> Clip:
        from transformers import CLIPModel

        settings = self.settings
        model = load_model(CLIPModel, settings.path, settings.revision)
        return Clip(
            model,
            settings.tokenizer,
            settings,
            self.device,
            weights=weights_of(settings, "path"),
            tokenizer_revision=settings.tokenizer_revision,
        )

    @property
    def factor(self) -> float:
        return self.clip.scale / DIVISOR


PLUGIN = PickScore

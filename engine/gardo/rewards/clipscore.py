"""CLIPScore: how well an image fits its prompt, by OpenAI's CLIP ViT-L/14.

    score = 100 cos(image, prompt) / 30

100 is the model's own exp(logit_scale), the division by 30 Flow-GRPO's; usual values are about 0.5
to 1.2. Differentiable. (The paper of that name, arXiv 2104.08718, takes 2.5 max(cos, 0) of the
ViT-B/32.)

Weights and tokenizer: openai/clip-vit-large-patch14. Preprocessing clip-crop-1 (_pixels.py). Not
verified against the published weights yet: the tests compare tiny random models of the same class.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gardo.rewards._clip import Clip, ClipReward
from gardo.rewards._files import TOKENIZER_FILES, ModelFolder, ModelRewardSettings
from gardo.rewards._loading import load_model
from gardo.rewards.base import About, Holds, weights_of

SCALE = 100
DIVISOR = 30


class ClipScoreSettings(ModelRewardSettings):
    kind: Literal["clipscore"] = "clipscore"
    path: Annotated[ModelFolder, TOKENIZER_FILES, Holds("CLIPModel")] = Field(
        "openai/clip-vit-large-patch14", description="hub id or folder"
    )


class ClipScore(ClipReward):
    Settings = ClipScoreSettings
    about = About("100 cos(image, prompt) / 30", "0.5 to 1.2", "MIT (authors' repository)")
    factor = SCALE / DIVISOR

    def load(self) -> Clip:
        from transformers import CLIPModel

        path, revision = self.settings.path, self.settings.revision
        model = load_model(CLIPModel, path, revision)
        return Clip(
            model,
            path,
            self.settings,
            self.device,
            weights=weights_of(self.settings, "path"),
            tokenizer_revision=revision,
        )


PLUGIN = ClipScore

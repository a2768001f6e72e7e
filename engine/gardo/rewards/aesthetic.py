"""LAION's aesthetic predictor, v2: how pleasing a picture is, whatever the prompt.

    score = w . image / |image| + b        image: the projected features of CLIP ViT-L/14

Usual scores are 3 to 8; they are raw. Differentiable.

The published head (improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth) is a chain of
Linear layers with nothing but dropout between them. It is one affine map, so w and b are computed
once, in float64. The files called relu have activations between the same layers, and a file does
not show it: they are not for this reward.

Weights: openai/clip-vit-large-patch14, only the image tower; the head from
trl-lib/ddpo-aesthetic-predictor, or a folder with the file of the release. Preprocessing
clip-crop-1 (_pixels.py). Not verified against the published weights yet: the tests compare tiny
random models of the same class.

Shapes: B images, E width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from gardo.rewards._affine import collapse
from gardo.rewards._clip import unit_features
from gardo.rewards._files import ModelFolder, ModelRewardSettings, holding
from gardo.rewards._loading import frozen, load_model, read_weights
from gardo.rewards._pixels import for_clip
from gardo.rewards.base import About, Holds, Reward, weights_of
from gardo.settings import FieldError
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor


class AestheticSettings(ModelRewardSettings):
    kind: Literal["aesthetic"] = "aesthetic"
    path: Annotated[ModelFolder, Holds("CLIPVisionModelWithProjection")] = Field(
        "openai/clip-vit-large-patch14", description="hub id or folder"
    )
    head_file: str = Field("aesthetic-model.pth", description="the file of the head")
    head: Annotated[str, holding(lambda fields: fields["head_file"])] = Field(
        "trl-lib/ddpo-aesthetic-predictor", description="hub id or folder of the head"
    )
    head_revision: str | None = Field(
        None, description="commit or tag of a hub id `head`; its newest if left out"
    )


class Aesthetic(Reward):
    Settings = AestheticSettings
    about = About(
        "w . image / |image| + b", "3 to 8", "CLIP: MIT (authors' repository); head: see its page"
    )
    differentiable = True

    def __init__(self, settings: AestheticSettings, device: torch.device) -> None:
        from transformers import CLIPVisionModelWithProjection

        super().__init__(settings, device)
        model = load_model(
            CLIPVisionModelWithProjection, settings.path, settings.revision, also="clip"
        )
        where = f"head: {settings.head_file} of {settings.head!r}"
        try:
            weight_E, bias = collapse(
                read_weights(
                    settings.head, settings.head_file, settings.head_revision, field="head"
                )
            )
        except FieldError:
            raise
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        width = model.config.projection_dim
        if len(weight_E) != width:
            raise ValueError(
                f"{where} takes {len(weight_E)} features, the model of {settings.path!r} "
                f"has {width}"
            )
        self.weight_E = weight_E.float().to(device)
        self.bias = bias.float().to(device)
        self.size = model.config.image_size
        self.model = frozen(model, settings.dtype, device, weights_of(settings, "path"))

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        def encode(part: Tensor) -> Tensor:
            pixels = for_clip(part.to(self.device), self.size).to(self.model.dtype)
            return self.model(pixels).image_embeds

        image_BE = unit_features(encode, images_B3HW, self.settings.batch)
        return image_BE @ self.weight_E + self.bias


PLUGIN = Aesthetic

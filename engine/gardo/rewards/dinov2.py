"""DINOv2 features (arXiv 2304.07193) for diversity, as those of DINOv3 (_dino.py), at 224 pixels.

The weights are free of DINOv3's licence. The published models' position embeddings are those of 518
pixels a side; they are resized to 224, 16 x 16 patches of 14 pixels. Models with registers are of
another class and refused. Not verified against the published weights yet: the tests use a tiny
random model of the same class.

    rewards:
      dinov2: {role: features}
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gardo.rewards._dino import Dino, DinoSettings
from gardo.rewards._files import ModelFolder
from gardo.rewards.base import About, Holds


class Dinov2Settings(DinoSettings):
    kind: Literal["dinov2"] = "dinov2"
    role: Literal["features"] = "features"
    path: Annotated[ModelFolder, Holds("Dinov2Model")] = Field(
        "facebook/dinov2-large", description="hub id or folder"
    )
    size: int = Field(224, ge=8, le=8192, description="pixels a side; a multiple of the patch size")


class Dinov2(Dino):
    Settings = Dinov2Settings
    about = About("mean patch token at 224 pixels", "features", "Apache-2.0 (authors' repository)")
    model_class = "Dinov2Model"


PLUGIN = Dinov2

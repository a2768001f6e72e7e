"""DINOv3 features for diversity: the mean of the patch tokens after the final norm (_dino.py).

That is GARDO's released definition, at 256 pixels a side.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gardo.rewards._dino import Dino, DinoSettings
from gardo.rewards._files import ModelFolder
from gardo.rewards.base import About, Holds


class Dinov3Settings(DinoSettings):
    kind: Literal["dinov3"] = "dinov3"
    role: Literal["features"] = "features"
    path: Annotated[ModelFolder, Holds("DINOv3ViTModel")] = Field(
        "facebook/dinov3-vitl16-pretrain-lvd1689m", description="hub id or folder"
    )
    size: int = Field(256, ge=8, le=8192, description="pixels a side; a multiple of the patch size")


class Dinov3(Dino):
    Settings = Dinov3Settings
    about = About("mean patch token at 256 pixels", "features", "DINOv3 License, gated", gated=True)
    model_class = "DINOv3ViTModel"


PLUGIN = Dinov3

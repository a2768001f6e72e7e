"""JPEG's size of a picture in kB: DDPO's compressibility, or incompressibility (arXiv 2305.13301).

    compress: true      value = -bytes / 1000       pictures that compress well
    compress: false     value = +bytes / 1000       pictures full of detail

The bytes are those of Pillow's encoder (4:2:0 chroma, standard Huffman tables) of the picture in 8
bits; another version of libjpeg may differ by some bytes. The prompt is not looked at, and there is
no gradient.

    rewards:
      jpeg_size: {role: proxy, compress: false}

An image with a value that is not finite has none. Shapes: B images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from gardo.lazily import no_grad
from gardo.rewards._pixels import eight_bits
from gardo.rewards.base import About, Reward, RewardSettings
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

KILO = 1000  # as DDPO has it


class JpegSizeSettings(RewardSettings):
    kind: Literal["jpeg_size"] = "jpeg_size"
    quality: int = Field(95, ge=1, le=95, description="of JPEG; above 95 Pillow disables parts")
    compress: bool = Field(True, description="a small file is good; false: a large one")
    batch: int = Field(64, ge=1, description="images that are made 8-bit pictures at once")


def jpeg_bytes(picture_HW3: np.ndarray, quality: int) -> int:
    """How long the JPEG of an 8-bit RGB picture is."""
    file = io.BytesIO()
    Image.fromarray(picture_HW3).save(file, format="JPEG", quality=quality)
    return file.tell()


class JpegSize(Reward):
    Settings = JpegSizeSettings
    about = About(
        "minus the kB of its JPEG; plus with compress: false (DDPO's two)",
        "kB; below 0, or above with compress: false",
        verified="in full, with Pillow's encoder",
    )

    @no_grad
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sign = -1 if self.settings.compress else 1
        values = [
            math.nan
            if picture is None
            else sign * jpeg_bytes(picture, self.settings.quality) / KILO
            for part in images_B3HW.split(self.settings.batch)
            for picture in eight_bits(part)
        ]
        return torch.tensor(values, dtype=torch.float32, device=images_B3HW.device)


PLUGIN = JpegSize

"""How pictures are resized, cut, padded and normalised, against Pillow and transformers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import image_utils
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gardo.rewards import _pixels
from tests.engine.rewards.clip_models import (
    SIZE,
    pictures,
    pil,
)


def test_means_and_deviations_are_those_of_transformers() -> None:
    assert _pixels.CLIP == (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD)
    imagenet = image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD
    assert imagenet == _pixels.IMAGENET


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 64), (61, 40), (33, 90), (20, 17)])
def test_crop_is_that_of_transformers_processor(height: int, width: int) -> None:
    """Up to Pillow's rounding to 8 bits: at most 0.5 / 255 a pass, two passes, over std .26."""
    images = pictures(2, height, width)
    wanted = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)(
        pil(images), return_tensors="pt"
    ).pixel_values
    out = _pixels.for_clip(images, SIZE)
    assert out.shape == (2, 3, SIZE, SIZE)
    assert float((out - wanted).abs().max()) < 2 / 255 / 0.26
    assert float((out - wanted).abs().mean()) < 0.5 / 255 / 0.26


@pytest.mark.parametrize(("height", "width"), [(64, 64), (61, 40), (33, 90), (20, 17)])
def test_pad_fits_the_whole_image_between_black_bars(height: int, width: int) -> None:
    images, longer = pictures(1, height, width), max(height, width)
    inner = (round(width * (SIZE / longer)), round(height * (SIZE / longer)))
    canvas = Image.new("RGB", (SIZE, SIZE))
    canvas.paste(
        pil(images)[0].resize(inner, Image.Resampling.BICUBIC),
        ((SIZE - inner[0]) // 2, (SIZE - inner[1]) // 2),
    )
    bytes_HW3 = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    wanted = bytes_HW3.view(SIZE, SIZE, 3).permute(2, 0, 1) / 255
    out = _pixels.for_clip(images, SIZE, "pad")[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in _pixels.CLIP)
    out = out * std + mean
    assert out.shape == wanted.shape
    assert float((out - wanted).abs().max()) < 2 / 255


def test_resizing_stays_within_the_colours() -> None:
    """Bicubic overshoots at an edge by some percent; Pillow's 8 bits clip it."""
    edge = torch.zeros(1, 3, 90, 90)
    edge[..., 45:] = 1
    out = _pixels.for_clip(edge, SIZE)
    black, white = (_pixels.for_clip(torch.full((1, 3, SIZE, SIZE), x), SIZE) for x in (0.0, 1.0))
    assert bool((out >= black).all()) and bool((out <= white).all())

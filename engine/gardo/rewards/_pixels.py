"""Pictures as frozen models want them, on tensors and with gradients: resized, cut, normalised.

    clip-crop-1   the shorter side becomes the model's size, the centre is cut out
    clip-pad-1    the longer side becomes the model's size, black bars fill the square

Both are bicubic with antialias on, clamped to [0, 1], then normalised with CLIP's mean and
deviation. Pillow's bicubic, which the authors used, rounds to 8 bits in between; the pixels differ
by about 0.001. Square images come out the same under both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

Statistics = tuple[list[float], list[float]]  # mean and deviation of the three channels
CLIP: Statistics = (
    [0.48145466, 0.4578275, 0.40821073],
    [0.26862954, 0.26130258, 0.27577711],
)
IMAGENET: Statistics = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
Fit = Literal["crop", "pad"]


def resized(
    images_B3HW: Tensor, height: int, width: int, mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 3, height, width], untouched where that is its size."""
    if images_B3HW.shape[-2:] == (height, width):
        return images_B3HW
    images_B3HW = torch.nn.functional.interpolate(
        images_B3HW, (height, width), mode=mode, antialias=True
    )
    return images_B3HW.clamp(0, 1) if mode == "bicubic" else images_B3HW  # bicubic overshoots


def cropped(images_B3HW: Tensor, size: int) -> Tensor:
    """The middle [size, size] of the images, once their shorter side has that size."""
    H, W = images_B3HW.shape[-2:]
    height, width = (size * n // min(H, W) for n in (H, W))
    top, left = (height - size) // 2, (width - size) // 2
    return resized(images_B3HW, height, width)[..., top : top + size, left : left + size]


def padded(images_B3HW: Tensor, size: int) -> Tensor:
    """The whole images with the longer side `size`, in the middle of a black [size, size]."""
    H, W = images_B3HW.shape[-2:]
    height, width = (round(n * (size / max(H, W))) for n in (H, W))
    top, left = (size - height) // 2, (size - width) // 2
    bars = (left, size - width - left, top, size - height - top)
    return torch.nn.functional.pad(resized(images_B3HW, height, width), bars)


FITS = {"crop": cropped, "pad": padded}


def normalised(images_B3HW: Tensor, statistics: Statistics) -> Tensor:
    mean, std = (images_B3HW.new_tensor(values)[:, None, None] for values in statistics)
    return (images_B3HW - mean) / std


def luma(images_B3HW: Tensor) -> Tensor:
    """[B, H, W]: BT.601's brightness of gamma-coded pixels, the Y of JPEG."""
    red, green, blue = images_B3HW.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def eight_bits(images_B3HW: Tensor) -> list[np.ndarray | None]:
    """Each image in 8 bits, RGB [H, W, 3]; None where it is not finite."""
    finite = images_B3HW.isfinite().flatten(1).all(1).tolist()
    bytes_B3HW = (images_B3HW.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    bytes_BHW3 = bytes_B3HW.permute(0, 2, 3, 1).contiguous().cpu()
    return [p if ok else None for p, ok in zip(bytes_BHW3.numpy(), finite, strict=True)]


def for_clip(images_B3HW: Tensor, size: int, fit: Fit = "crop") -> Tensor:
    """[B, 3, H, W] in [0, 1] -> normalised [B, 3, size, size]: clip-crop-1, or clip-pad-1."""
    return normalised(FITS[fit](images_B3HW, size), CLIP)

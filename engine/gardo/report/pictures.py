"""Images and grids of them as PNG files.

Shapes: B images, H by W pixels.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gardo.files import write_atomically

MAX_PIXELS, MIN_SIDE = 64_000_000, 64  # of a grid of files, and of its pictures
SMALL = 128  # pixels of a side below which such a grid shows images twice as large
_GAP_COLOR = (128, 134, 142)  # a grey that stands out from light and from dark pictures


def save_grid(
    images_B3HW: Tensor, path: str | Path, columns: int, *, scale: int = 2, padding: int = 2
) -> None:
    """Write images as one PNG, row by row, each pixel enlarged to `scale` x `scale`.

    Args:
        images_B3HW: RGB in [0, 1], any float dtype and device; values outside are clamped, NaN is
            black.
        path: the file, written whole or not at all; its folder is made.
        columns: images in a row; an unfinished last row is filled with the gap's grey.
        scale: enlargement by repetition, at least 1.
        padding: width of the gaps between images and around the grid, in pixels of the file.

    Raises:
        ValueError: wrong shape or dtype, no image, or a size out of range.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or 0 in images_B3HW.shape:
        raise ValueError(f"expected images [B, 3, H, W], got shape {tuple(images_B3HW.shape)}")
    if not images_B3HW.is_floating_point():
        raise ValueError(f"expected float images in [0, 1], got {images_B3HW.dtype}")
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(f"columns {columns}, scale {scale} or padding {padding} out of range")

    images = images_B3HW.detach().to("cpu", torch.float32).nan_to_num(nan=0.0).clamp(0, 1)
    pixels_BHW3 = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    pixels_BHW3 = pixels_BHW3.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    count, height, width, _ = pixels_BHW3.shape
    rows = -(-count // columns)
    size = (
        columns * (width + padding) + padding,
        rows * (height + padding) + padding,
    )
    grid = Image.new("RGB", size, _GAP_COLOR)
    for index, pixels_HW3 in enumerate(pixels_BHW3):
        row, column = divmod(index, columns)
        corner = (padding + column * (width + padding), padding + row * (height + padding))
        grid.paste(Image.fromarray(pixels_HW3.contiguous().numpy()), corner)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    grid.save(encoded, format="PNG", optimize=True)
    write_atomically(path, encoded.getvalue())


def save_image(image_3HW: Tensor, path: str | Path) -> None:
    """Write one image as a PNG of its own size; as `save_grid` otherwise."""
    save_grid(image_3HW[None], path, columns=1, scale=1, padding=0)


def read_images(paths: Sequence[Path], *, longest: int | None = None) -> Tensor:
    """Images of one size, fp32 [B, 3, H, W] in [0, 1]; made smaller where a side is longer than
    `longest` pixels. OSError where one cannot be read."""
    images = []
    for path in paths:
        with Image.open(path, formats=["PNG"]) as picture:
            colours = picture.convert("RGB")
            if longest:
                colours.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(colours.tobytes()), dtype=torch.uint8)
            images.append(pixels.view(colours.height, colours.width, 3).permute(2, 0, 1))
    return torch.stack(images).float() / 255


def save_grid_of(pictures: Sequence[Path], path: Path, columns: int) -> Path:
    """A grid of files of one size, made smaller where many are large; returns its path."""
    side = max(MIN_SIDE, int((MAX_PIXELS / len(pictures)) ** 0.5))
    images = read_images(pictures, longest=side)
    save_grid(images, path, columns, scale=2 if max(images.shape[2:]) < SMALL else 1)
    return path

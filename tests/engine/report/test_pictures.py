"""Grids of images: every pixel in its place."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from gardo.report.pictures import save_grid


def test_grid_places_pixels_row_by_row(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 1, 2)
    images[0, 0] = 1.0  # red
    images[1, 1] = 7.0  # clamped to green
    images[2, 2, 0, 1] = 0.5
    images[2, 0, 0, 0] = math.nan
    save_grid(images.to(torch.bfloat16), tmp_path / "new" / "a.png", columns=2, scale=3, padding=1)
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.size == (2 * 6 + 3, 2 * 3 + 3)
        gap = picture.getpixel((0, 0))
        assert picture.getpixel((1, 1)) == picture.getpixel((6, 3)) == (255, 0, 0)
        assert picture.getpixel((8, 1)) == (0, 255, 0) and picture.getpixel((7, 1)) == gap
        assert picture.getpixel((1, 5)) == (0, 0, 0) and picture.getpixel((4, 5)) == (0, 0, 128)
        assert picture.getpixel((8, 5)) == gap
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 1, 4, 4), (3, 4, 4)])
def test_grid_refuses_other_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected images"):
        save_grid(torch.zeros(shape), tmp_path / "a.png", 2)
    assert not list(tmp_path.iterdir())

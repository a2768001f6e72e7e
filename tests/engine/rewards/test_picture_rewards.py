"""Rewards on pixels alone: JPEG's size, sharpness, colours; against Pillow, scipy and formulas."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from torch import Tensor

from gardo.rewards import jpeg_size
from gardo.types import Prompt
from tests.engine.rewards.tiny_pictures import build, clean

STATISTICS = ("colourfulness", "saturation", "contrast")
PIXEL_REWARDS: list[tuple[str, dict[str, Any]]] = [
    ("jpeg_size", {}),
    ("sharpness", {}),
    *(("colour_statistics", {"statistic": name}) for name in STATISTICS),
]


def noise(count: int, seed: int = 3) -> Tensor:
    """8-bit noise, [count, 3, 24, 32]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 24, 32), generator=generator).float() / 255


def pil(image_3HW: Tensor) -> Image.Image:
    return Image.fromarray((image_3HW * 255).round().byte().permute(1, 2, 0).numpy())


def scored(kind: str, images: Tensor, **settings: Any) -> Tensor:
    value: Tensor = build(kind, **settings).score(images, [Prompt("any")] * len(images))
    assert value.dtype == torch.float32 and value.shape == (len(images),)
    return value


@pytest.mark.parametrize(("kind", "settings"), PIXEL_REWARDS)
def test_batches_and_a_broken_image(kind: str, settings: dict[str, Any]) -> None:
    images = noise(5)
    whole = scored(kind, images, **settings)
    assert torch.equal(scored(kind, images, batch=2, **settings), whole)
    images[2, 1, 4, 4] = torch.nan
    broken = scored(kind, images, **settings)
    assert broken.isfinite().tolist() == [True, True, False, True, True]
    assert torch.equal(broken[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


# ---- jpeg_size -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [40, 95])
@pytest.mark.parametrize("compress", [True, False])
def test_the_size_is_that_of_the_file(quality: int, compress: bool) -> None:
    images = torch.cat([noise(2), torch.full((1, 3, 24, 32), 0.5)])
    wanted = []
    for image in images:
        pil(image).save(file := io.BytesIO(), "JPEG", quality=quality)
        wanted.append((-1 if compress else 1) * len(file.getvalue()) / 1000)
    value = scored("jpeg_size", images, quality=quality, compress=compress)
    assert value.tolist() == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted[0]) > 1.2 * abs(wanted[2])


def test_ddpos_compressibility_is_the_default() -> None:
    settings = jpeg_size.JpegSizeSettings(role="proxy")
    assert settings.quality == 95 and settings.compress
    flat, busy = scored("jpeg_size", torch.stack([torch.zeros(3, 24, 32), noise(1)[0]])).tolist()
    assert busy < flat < 0


# ---- sharpness -----------------------------------------------------------------------------------


def test_sharpness_is_the_variance_of_scipys_laplacian() -> None:
    images = noise(3)
    wanted = []
    for image in images.double().numpy():
        luma = np.tensordot([0.299, 0.587, 0.114], image, 1)
        wanted.append(ndimage.laplace(luma)[1:-1, 1:-1].var())
    assert scored("sharpness", images).tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_blurred_picture_is_less_sharp_and_a_slope_not_at_all() -> None:
    images, _ = clean(4, 5)
    blurred = torch.stack([
        torch.from_numpy(np.array(pil(image).filter(ImageFilter.GaussianBlur(1)))).permute(2, 0, 1)
        for image in images
    ]) / 255  # fmt: skip
    assert bool((scored("sharpness", blurred) < 0.5 * scored("sharpness", images)).all())
    slope = torch.linspace(0, 1, 32).expand(1, 3, 24, 32)
    assert float(scored("sharpness", slope)) < 1e-12


# ---- colour_statistics ---------------------------------------------------------------------------


def test_the_formulas_of_the_statistics() -> None:
    images = noise(3)
    red, green, blue = images.double().unbind(1)
    rg, yb = 255 * (red - green), 255 * ((red + green) / 2 - blue)
    most, least = images.double().amax(1), images.double().amin(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    for i in range(3):
        deviation = math.hypot(float(rg[i].std(correction=0)), float(yb[i].std(correction=0)))
        mean = math.hypot(float(rg[i].mean()), float(yb[i].mean()))
        wanted = {
            "colourfulness": deviation + 0.3 * mean,
            "saturation": float((1 - least[i] / most[i].clamp(min=1e-9)).mean()),
            "contrast": float(luma[i].std(correction=0)),
        }
        for statistic, value in wanted.items():
            got = scored("colour_statistics", images[i : i + 1], statistic=statistic)
            assert float(got) == pytest.approx(value, rel=1e-5), statistic


def test_saturation_is_pillows() -> None:
    """To the 8 bits that its S has."""
    images = noise(2)
    wanted = [np.array(pil(image).convert("HSV"))[..., 1].mean() / 255 for image in images]
    got = scored("colour_statistics", images, statistic="saturation")
    assert got.tolist() == pytest.approx(wanted, abs=1 / 255)


def test_pictures_whose_statistics_are_known() -> None:
    grey, red = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    halves = torch.zeros(1, 3, 8, 8)
    halves[..., :4] = 1
    values = {
        name: scored("colour_statistics", torch.cat([grey, red, halves]), statistic=name).tolist()
        for name in STATISTICS
    }
    # red: rg = 255, yb = 127.5, and no deviation
    assert values["colourfulness"] == pytest.approx([0, 0.3 * math.hypot(255, 127.5), 0], abs=1e-3)
    assert values["saturation"] == pytest.approx([0, 1, 0], abs=1e-6)
    assert values["contrast"] == pytest.approx([0, 0, 0.5], abs=1e-6)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "settings"), PIXEL_REWARDS[1:])
def test_gradients_are_those_of_differences(kind: str, settings: dict[str, Any]) -> None:
    """float32, against central differences in steps where rounding is below 1e-2 of them."""
    reward = build(kind, **settings)
    assert reward.differentiable
    images = (0.2 + 0.6 * noise(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, []).sum(), images)
    direction = gradient / gradient.norm()
    step = 1e-3
    at = images.detach()
    up, down = (float(reward.score(at + s * direction, [])) for s in (step, -step))
    assert (up - down) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.03)


@pytest.mark.parametrize(("kind", "settings"), PIXEL_REWARDS[1:])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_a_flat_picture_has_a_gradient(kind: str, settings: dict[str, Any], level: float) -> None:
    """Roots have no slope at 0; NaN there would end a run."""
    images = torch.full((1, 3, 8, 8), level, requires_grad=True)
    value = build(kind, **settings).score(images, [])
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert value.tolist() == pytest.approx([0], abs=1e-6) and bool(gradient.isfinite().all())


def test_jpeg_has_none() -> None:
    assert not build("jpeg_size").differentiable

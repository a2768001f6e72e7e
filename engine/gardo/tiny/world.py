"""A world of 32 x 32 pictures: one to three circles, squares or triangles of one colour.

The ground is dark. Every picture has a caption ("two red circles"). The world is small enough that
a Flux of a million parameters learns it in minutes on two CPU cores, and rich enough to show reward
hacking: counts can be faked with specks, layouts can collapse.

Shapes: B pictures, K object slots (3), H = W = 32 pixels. Pictures: float32 [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 32
COUNTS = ("one", "two", "three")
SHAPES = ("circle", "square", "triangle")
HUES = {"red": 0.0, "yellow": 1 / 6, "green": 1 / 3, "cyan": 1 / 2, "blue": 2 / 3, "magenta": 5 / 6}
COLOURS = tuple(HUES)
HUE_JITTER = 0.03  # of the colour circle: neighbours are 1/6 apart
RADIUS = (3.5, 6.0)  # pixels
_GAP = 1.5  # pixels between two objects, and half of it to the border


@dataclass(frozen=True)
class Scene:
    """B pictures as numbers: what `draw` draws and `caption` says."""

    count_B: Tensor  # int64, 1..3
    colour_B: Tensor  # int64, index into COLOURS
    shape_BK: Tensor  # int64, index into SHAPES
    centre_BK2: Tensor  # float32 pixels, (x, y)
    radius_BK: Tensor  # float32 pixels
    rgb_BK3: Tensor  # float32 in [0, 1]
    ground_B: Tensor  # float32 grey level in [0, 1]


def prompts() -> list[str]:
    """All 54 captions, in the order count, colour, shape."""
    return [
        caption(n, c, s)
        for n in range(1, len(COUNTS) + 1)
        for c in range(len(COLOURS))
        for s in range(len(SHAPES))
    ]


def caption(count: int, colour: int, shape: int) -> str:
    return f"{COUNTS[count - 1]} {COLOURS[colour]} {SHAPES[shape]}{'s' if count > 1 else ''}"


def parse(prompt: str) -> tuple[int, int, int]:
    """(count, colour index, shape index) of a caption. ValueError names the unknown word."""
    words = prompt.strip().lower().split()
    if len(words) != 3:
        raise ValueError(f"prompt {prompt!r}: expected three words, such as 'two red circles'")
    count, colour, shape = words[0], words[1], words[2].removesuffix("s")
    for word, known in ((count, COUNTS), (colour, COLOURS), (shape, SHAPES)):
        if word not in known:
            raise ValueError(f"prompt {prompt!r}: {word!r} is none of {', '.join(known)}")
    return COUNTS.index(count) + 1, COLOURS.index(colour), SHAPES.index(shape)


@dataclass(frozen=True)
class Asked:
    """What B captions ask for."""

    count_B: Tensor  # int64, 1..3
    colour_B: Tensor  # int64, index into COLOURS
    shape_B: Tensor  # int64, index into SHAPES
    hue_B: Tensor  # float32 in [0, 1]


def asked(prompts: Sequence[str], device: torch.device) -> Asked:
    count_B, colour_B, shape_B = torch.tensor([parse(p) for p in prompts], device=device).T
    hue_B = torch.tensor(list(HUES.values()), device=device)[colour_B]
    return Asked(count_B, colour_B, shape_B, hue_B)


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[...] hue, saturation, value in [0, 1] -> [..., 3] RGB in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] * 6.0) % 6.0
    ramp = torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)
    return value[..., None] * (1.0 - saturation[..., None] * ramp)


def rgb_to_hsv(rgb_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, 3, H, W] in [0, 1] -> hue, saturation, value, each [B, H, W] in [0, 1].

    The hue is 0 where there is no colour.
    """
    value, arg = rgb_B3HW.max(1)
    chroma = value - rgb_B3HW.amin(1)
    red, green, blue = rgb_B3HW.unbind(1)
    sector = torch.where(
        arg == 0, green - blue, torch.where(arg == 1, blue - red, red - green)
    ) / chroma.clamp(min=1e-6)
    hue = torch.where(chroma > 1e-6, (sector + 2 * arg) / 6 % 1.0, torch.zeros_like(value))
    return hue, chroma / value.clamp(min=1e-6), value


def hue_distance(hue: Tensor, other: Tensor) -> Tensor:
    """Distance on the colour circle, 0 to 0.5."""
    return ((hue - other + 0.5) % 1.0 - 0.5).abs()


def sample_scenes(batch: int, generator: torch.Generator, *, mixed: bool = False) -> Scene:
    """Random scenes.

    With `mixed`, shapes and colours differ between the objects of a picture (no caption fits).
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    slots = len(COUNTS)
    count_B = torch.randint(1, slots + 1, (batch,), generator=generator)
    per_object = (batch, slots) if mixed else (batch, 1)
    colour_BK = torch.randint(len(COLOURS), per_object, generator=generator).expand(batch, slots)
    shape_BK = torch.randint(len(SHAPES), per_object, generator=generator).expand(batch, slots)
    radius_BK = uniform(*RADIUS, batch, 1) * uniform(0.9, 1.1, batch, slots)
    hue_BK = torch.tensor(list(HUES.values()))[colour_BK] + uniform(
        -HUE_JITTER, HUE_JITTER, batch, 1
    )
    rgb_BK3 = hsv_to_rgb(
        hue_BK % 1.0,
        uniform(0.8, 1.0, batch, 1).expand(batch, slots),
        uniform(0.8, 1.0, batch, 1).expand(batch, slots),
    )
    return Scene(
        count_B=count_B,
        colour_B=colour_BK[:, 0],
        shape_BK=shape_BK,
        centre_BK2=_place(radius_BK, count_B, generator),
        radius_BK=radius_BK,
        rgb_BK3=rgb_BK3,
        ground_B=uniform(0.06, 0.14, batch),
    )


def _place(radius_BK: Tensor, count_B: Tensor, generator: torch.Generator) -> Tensor:
    """Centres at which circles of the first `count` objects' radii do not touch (by rejection).

    Corners reach beyond the radius: in 1 % of the pictures two squares or triangles touch.
    """
    batch, slots = radius_BK.shape
    margin_BK1 = (radius_BK + _GAP / 2)[..., None]
    reach_BKK = radius_BK[:, :, None] + radius_BK[:, None, :] + _GAP
    used_BK = torch.arange(slots) < count_B[:, None]
    ignored_BKK = ~(used_BK[:, :, None] & used_BK[:, None, :]) | torch.eye(slots, dtype=torch.bool)
    centre_BK2 = torch.zeros(batch, slots, 2)
    pending_B = torch.ones(batch, dtype=torch.bool)
    while pending_B.any():
        draw = torch.rand(batch, slots, 2, generator=generator)
        draw = margin_BK1 + draw * (SIZE - 2 * margin_BK1)
        distance_BKK = torch.cdist(draw, draw)
        fits_B = ((distance_BKK > reach_BKK) | ignored_BKK).all(-1).all(-1)
        take_B = fits_B & pending_B
        centre_BK2[take_B] = draw[take_B]
        pending_B &= ~take_B
    return centre_BK2


def draw(scene: Scene) -> Tensor:
    """Antialiased pictures of the scenes, float32 [B, 3, 32, 32] in [0, 1]."""
    axis = torch.arange(SIZE) + 0.5
    y_HW, x_HW = torch.meshgrid(axis, axis, indexing="ij")
    batch, slots = scene.radius_BK.shape
    picture = scene.ground_B[:, None, None, None].expand(batch, 3, SIZE, SIZE).clone()
    for k in range(slots):
        x = x_HW - scene.centre_BK2[:, k, 0, None, None]
        y = y_HW - scene.centre_BK2[:, k, 1, None, None]
        r = scene.radius_BK[:, k, None, None]
        shape = scene.shape_BK[:, k, None, None]
        circle = torch.sqrt(x * x + y * y) - r
        square = torch.maximum(x.abs(), y.abs()) - 0.86 * r
        slope = math.sqrt(3.0)
        triangle = torch.maximum((slope * x.abs() - y) / 2 - 0.6 * r, y - 0.75 * r)
        distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
        alpha = (0.5 - distance).clamp(0.0, 1.0)
        alpha = alpha * (k < scene.count_B)[:, None, None]
        rgb = scene.rgb_BK3[:, k, :, None, None]
        picture = picture * (1 - alpha[:, None]) + rgb * alpha[:, None]
    return picture


def captions(scene: Scene) -> list[str]:
    return [
        caption(int(n), int(c), int(s))
        for n, c, s in zip(scene.count_B, scene.colour_B, scene.shape_BK[:, 0], strict=True)
    ]

"""Pictures of the tiny world and of nothing in it, and what its rewards say of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gardo import plugins
from gardo.tiny import world

CPU = torch.device("cpu")


def build(kind: str, role: str = "proxy", **settings: Any) -> Any:
    plugin = plugins.resolve("gardo.rewards", kind)
    return plugin(plugin.Settings(kind=kind, role=role, **settings), CPU)


def score(kind: str, images: Tensor, prompts: Sequence[str], **settings: Any) -> Tensor:
    values = build(kind, **settings).score(images, prompts)
    assert values.dtype == torch.float32 and values.shape == (len(images),)
    assert bool(values.isfinite().all())
    return values


def clean(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Fresh pictures and their captions."""
    scene = world.sample_scenes(count, torch.Generator().manual_seed(seed))
    return world.draw(scene), world.captions(scene)


def boxes(places: Sequence[tuple[int, int]], size: int, hue: float) -> Tensor:
    """[1, 3, 32, 32]: black, with squares of one hue whose corners are at (y, x)."""
    picture = torch.zeros(1, 3, 32, 32)
    rgb = world.hsv_to_rgb(torch.tensor(hue), torch.tensor(1.0), torch.tensor(0.9))
    for y, x in places:
        picture[0, :, y : y + size, x : x + size] = rgb[:, None, None]
    return picture

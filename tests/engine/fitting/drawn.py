"""Files of pairs with verdicts that a model can see: the brighter picture is preferred."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gardo.fitting.command import Wanted
from gardo.tiny import world

Line = dict[str, Any]
SIDE = 32


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of the tiny world before a grey, and how bright that is."""
    generator = torch.Generator().manual_seed(seed)
    bright_B = torch.rand(count, generator=generator)
    drawn = world.draw(world.sample_scenes(count, generator))
    return (drawn + bright_B[:, None, None, None]) / 2, bright_B


def save(picture: Tensor, path: Path) -> None:
    bytes_HW3 = (picture * 255).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(bytes_HW3.numpy()).save(path)


def by_brightness(first: float, second: float, _: int) -> Line:
    return {"preferred": "first" if first > second else "second"}


def at_random(first: float, second: float, at: int) -> Line:
    draw = torch.rand((), generator=torch.Generator().manual_seed(at + 77))
    return {"preferred": "first" if draw < 0.5 else "second"}


def ties_where_near(first: float, second: float, at: int) -> Line:
    return {"preferred": "tie"} if abs(first - second) < 0.15 else by_brightness(first, second, at)


def with_margins(first: float, second: float, at: int) -> Line:
    return by_brightness(first, second, at) | {"margin": abs(first - second)}


def write(
    folder: Path,
    count: int = 160,
    prompts: int = 20,
    seed: int = 1,
    verdict: Callable[[float, float, int], Line] = by_brightness,
) -> Path:
    """`pairs.jsonl` in the folder, and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    images, bright_B = pictures(2 * count, seed)
    lines = []
    for at in range(count):
        names = [f"{2 * at + k}.png" for k in (0, 1)]
        for k, name in enumerate(names):
            save(images[2 * at + k], folder / name)
        first, second = bright_B[2 * at : 2 * at + 2].tolist()
        line = {"prompt": f"prompt {at % prompts}", "first": names[0], "second": names[1]}
        lines.append(json.dumps(line | verdict(first, second, at)))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def wanted(out: Path, **other: Any) -> Wanted:
    """By the DINOv3 that ships."""
    own = {"features": "dinov3", "path": "builtin:dinov3", "size": SIDE, "device": "cpu"}
    return Wanted(**{**own, "out": out, **other})

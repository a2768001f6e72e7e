"""Values of an evaluation as a test wants them: normal noise around means of prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo.evaluation.values import Values

PROMPTS, IMAGES = 24, 4


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def around(mean_E: Tensor | float, *, spread: float = 0.1, seed: int = 0) -> Tensor:
    """[E, n] images of prompts with these means."""
    means = torch.as_tensor(mean_E, dtype=torch.float64).expand(PROMPTS)
    return means[:, None] + spread * noise(seed, PROMPTS, IMAGES)


def values(proxy: Tensor, *, diversity: float = 30.0, **held_out: Tensor) -> Values:
    return Values(
        rewards={"proxy": proxy, **held_out},
        roles={"proxy": "proxy", **dict.fromkeys(held_out, "held_out")},
        weights={"proxy": 1.0},
        diversity={"pairwise": diversity + noise(9, PROMPTS)},
        labels={},
    )

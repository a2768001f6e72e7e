"""Judges of pairs and of single images, and tournaments among pictures of one brightness.

Images are squares of one brightness, n / 255: a judge reads n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gardo.rewards.base import Gathering, Reward, RewardSettings
from gardo.rewards.preference import Preference, PreferenceSettings
from gardo.types import Prompt

CPU = torch.device("cpu")
KIND = __name__  # KIND:Duel names a judge in a recipe


class Settings(RewardSettings):
    role: Any = "judge"


class Level(Reward):
    """Scores an image by its number; 255 cannot be scored."""

    Settings = Settings

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        value_B = (images_B3HW[:, 0, 0, 0] * 255).round()
        return value_B.where(value_B < 255, torch.nan)


class Duel(Reward):
    """Compares two numbers, and keeps what it was asked."""

    Settings = Settings

    def __init__(self, settings: Any, device: torch.device) -> None:
        super().__init__(settings, device)
        self.asked: list[tuple[int, int, str]] = []
        self.largest_call = 0

    def verdict(self, first: int, second: int) -> float | None:
        return 0.5 + 0.5 * (first > second) - 0.5 * (first < second)

    def compare(self, first_N3HW: Tensor, second_N3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert first_N3HW.dtype == torch.float32 and len(first_N3HW) == len(prompts)
        levels = [(x[:, 0, 0, 0] * 255).round().int().tolist() for x in (first_N3HW, second_N3HW)]
        pairs = list(zip(*levels, strict=True))
        self.asked += [(a, b, text) for (a, b), text in zip(pairs, prompts, strict=True)]
        self.largest_call = max(self.largest_call, len(prompts))
        verdicts = [self.verdict(a, b) for a, b in pairs]
        return torch.tensor([math.nan if v is None else v for v in verdicts])


class First(Duel):
    """Always prefers what it sees first."""

    def verdict(self, first: int, second: int) -> float:
        return 1.0


class Leaning(Duel):
    """Half of its answers come from the order, half from the images."""

    def verdict(self, first: int, second: int) -> float:
        return 0.5 + 0.25 * (first > second) + 0.25 * (first == second) / 2


class Mute(Duel):
    """No verdict when 9 is shown first."""

    def verdict(self, first: int, second: int) -> float | None:
        return None if first == 9 else super().verdict(first, second)


class Chess(Duel):
    """A probability: sigmoid of the difference / 10."""

    def verdict(self, first: int, second: int) -> float:
        return float(torch.sigmoid(torch.tensor((first - second) / 10)))


class Loud(Duel):
    def verdict(self, first: int, second: int) -> float:
        return 2.0 * (first > second) - 1


class Neither(Reward):
    Settings = Settings


def preference(judge: str, **more: Any) -> Any:
    """A preference reward; `judge` is a class of this file."""
    kind = f"{KIND}:{judge}"
    settings = PreferenceSettings(
        kind="preference", role="proxy", judge=Settings(kind=kind), **more
    )
    return Preference(settings, CPU)


def squares(levels: Sequence[int]) -> Tensor:
    return (torch.tensor(levels) / 255)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def place(count: int, group: int, step: int = 3, seed: int = 42) -> Gathering:
    sample_B = torch.arange(count)
    return Gathering(sample_B, sample_B // group, seed, step, lambda tensor: tensor)


def values(reward: Preference, levels: Sequence[int], group: int, step: int = 3) -> list[float]:
    """Values, None where there is none."""
    prompts = [f"prompt {n // group}" for n in range(len(levels))]
    value_B = reward.score_together(squares(levels), prompts, place(len(levels), group, step))
    assert value_B.dtype == torch.float32
    return [None if math.isnan(value) else value for value in value_B.tolist()]

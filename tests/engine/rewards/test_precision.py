"""TF32 for rewards: asked for while a reward scores and at no other time, and near float32.

No CPU has TF32, so its rounding is done by hand: both factors of a product to 10 bits behind the
point, sums in float32, as a GPU does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.panel import Panel
from tests.engine.rewards.clip_models import PROMPTS, build, pictures

TF32 = torch.backends.cuda.matmul
KINDS = ["pickscore", "clipscore", "hpsv2", "aesthetic"]


def rounded(x: Tensor) -> Tensor:
    """To the nearest number with 10 bits of mantissa."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextmanager
def tf32_by_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    exact = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return exact(rounded(x), rounded(weight), bias)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", linear)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_scores_in_tf32_are_near(
    kind: str, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors to 2^-11: features of unit length to about 2^-9 after two layers, so a cosine too."""
    reward, images = build(kind, clip_folder), pictures(3)
    exact = reward.score(images, PROMPTS)
    with tf32_by_hand(monkeypatch):
        near = reward.score(images, PROMPTS)
    scale = {"pickscore": 97 / 26, "clipscore": 100 / 30, "hpsv2": 1.0, "aesthetic": 1.0}[kind]
    difference = float((near - exact).abs().max())
    assert 0 < difference < scale / 512


class Looks(Reward):
    """Says whether products were in TF32 while it scored."""

    def score(self, images_B3HW: Tensor, prompts: Any) -> Tensor:
        return torch.full((len(prompts),), float(TF32.allow_tf32))


class Fails(Looks):
    def score(self, images_B3HW: Tensor, prompts: Any) -> Tensor:
        assert TF32.allow_tf32
        raise KeyError


class WithDtype(RewardSettings):
    dtype: str = "tf32"


def panel(reward: type[Reward], dtype: str) -> Panel:
    settings = WithDtype(kind="looks", role="proxy", dtype=dtype)
    return Panel({"looks": reward(settings, torch.device("cpu"))})


@pytest.mark.parametrize(("dtype", "on"), [("tf32", 1.0), ("float32", 0.0), ("bfloat16", 0.0)])
def test_products_are_as_the_reward_says_and_only_inside(dtype: str, on: float) -> None:
    place = {"sample_B": torch.arange(3), "group_B": torch.zeros(3, dtype=torch.int64)}
    assert not TF32.allow_tf32
    scores = panel(Looks, dtype)(pictures(3), PROMPTS, **place)
    assert scores.rewards["looks"].tolist() == [on] * 3
    assert panel(Looks, dtype).differentiable_score(pictures(3), PROMPTS).tolist() == [on] * 3
    assert not TF32.allow_tf32


def test_a_reward_without_a_dtype_leaves_products_as_they_are() -> None:
    looks = Looks(RewardSettings(kind="looks", role="proxy"), torch.device("cpu"))
    TF32.allow_tf32 = True
    try:
        said = Panel({"looks": looks}).differentiable_score(pictures(3), PROMPTS)
        assert said.tolist() == [1.0] * 3 and TF32.allow_tf32
    finally:
        TF32.allow_tf32 = False


def test_an_error_leaves_nothing_on() -> None:
    with pytest.raises(KeyError):
        panel(Fails, "tf32").differentiable_score(pictures(3), PROMPTS)
    assert not TF32.allow_tf32

"""The panel: all rewards of a recipe scored together, and what fails masked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gardo.rewards import dinov3
from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.panel import Panel
from gardo.types import Prompt
from tests.engine.rewards.tiny_pictures import build, clean, score


class Settings(RewardSettings):
    nan_at: int | None = None
    infinite_at: int | None = None


class Brightness(Reward):
    """The mean brightness, but for two images."""

    Settings = Settings
    differentiable = True

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        values = images_B3HW.mean((1, 2, 3))
        index_B = torch.arange(len(values))
        for at, value in ((self.settings.nan_at, math.nan), (self.settings.infinite_at, math.inf)):
            values = values.where(index_B != at, value) if at is not None else values
        return values


BRIGHTNESS = f"{__name__}:Brightness"


def panel_scores(images: Tensor, prompts: list[str], **rewards: Reward) -> Any:
    index_B = torch.arange(len(images))
    return Panel(rewards)(images, prompts, sample_B=index_B, group_B=index_B // 2)


def test_panel_sums_weighted_proxies() -> None:
    images, prompts = clean(6, 36)
    out = panel_scores(
        images,
        prompts,
        count=build("tiny_count", weight=2.0),
        light=build(BRIGHTNESS, weight=-0.5),
        purity=build("tiny_purity", "auxiliary", weight=100.0),
        fidelity=build("tiny_fidelity", "held_out"),
    )
    count, light = score("tiny_count", images, prompts), images.mean((1, 2, 3))
    assert torch.allclose(out.proxy_B, 2 * count - 0.5 * light)
    assert set(out.rewards) == set(out.masks) == {"count", "light", "purity", "fidelity"}
    assert torch.equal(out.rewards["purity"], score("tiny_purity", images, prompts))
    assert out.auxiliaries == ("purity",)
    assert out.valid_B.tolist() == [True] * 6
    assert out.features_BD is None
    assert out.sample_B.tolist() == list(range(6)) and out.group_B.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("role", ["proxy", "auxiliary"])
def test_a_failed_reward_masks_its_sample(role: str) -> None:
    """NaN of one sample and infinity of another: neither is a zero that could be learned from."""
    images, prompts = clean(4, 37)
    out = panel_scores(
        images,
        prompts,
        purity=build("tiny_purity", "proxy"),
        flaky=build(BRIGHTNESS, role, nan_at=1, infinite_at=2),
    )
    assert out.masks["flaky"].tolist() == [True, False, False, True]
    assert out.masks["purity"].tolist() == [True] * 4
    assert out.valid_B.tolist() == [True, False, False, True]
    assert bool(out.proxy_B.isfinite().all())
    assert out.proxy_B[1:3].tolist() == [0, 0] and bool((out.proxy_B[[0, 3]] > 0.9).all())


def test_a_failed_held_out_reward_costs_no_sample() -> None:
    images, prompts = clean(4, 38)
    out = panel_scores(
        images,
        prompts,
        purity=build("tiny_purity", "proxy"),
        flaky=build(BRIGHTNESS, "held_out", nan_at=1),
    )
    assert out.masks["flaky"].tolist() == [True, False, True, True]
    assert out.valid_B.tolist() == [True] * 4
    assert torch.allclose(out.proxy_B, out.rewards["purity"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(4, 1), r"\[4, 1\]"),  # added to another proxy it would be [4, 4]
        (torch.zeros(3), r"\[3\]"),
        ((torch.zeros(4), torch.ones(4)), "tuple"),
        ([1, 2, 3, 4], "list"),
        (7, "int"),
        (None, "NoneType"),
    ],
)
def test_a_value_of_another_shape_is_told(given: Any, said: str) -> None:
    images, prompts = clean(4, 38)
    reward = build("tiny_purity")
    reward.score = lambda images_B3HW, prompts: given
    with pytest.raises(
        ValueError, match=rf"rewards.purity: TinyPurity.score gave {said}; .* a tensor \[4\], NaN"
    ):
        panel_scores(images, prompts, purity=reward)


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_reward_that_raises_is_named(differentiable: bool) -> None:
    images, prompts = clean(4, 38)
    reward = build("tiny_purity")

    def score(images_B3HW: Tensor, prompts: Any) -> Tensor:
        raise RuntimeError("out of ink")

    reward.score = score
    with pytest.raises(RuntimeError, match="out of ink") as raised:
        if differentiable:
            Panel({"purity": reward}).differentiable_score(images, prompts)
        else:
            panel_scores(images, prompts, purity=reward)
    assert raised.value.__notes__ == ["rewards.purity: TinyPurity failed"]


def test_panel_keeps_features_apart(features: dinov3.Dinov3) -> None:
    images, prompts = clean(3, 39)
    out = panel_scores(images, prompts, purity=build("tiny_purity"), dino=features)
    assert set(out.rewards) == set(out.masks) == {"purity"}
    assert torch.equal(out.features_BD, features.score(images, prompts))


def test_panel_scores_carry_no_gradient() -> None:
    images, prompts = clean(2, 40)
    out = panel_scores(images.requires_grad_(), prompts, shape=build("tiny_shape"))
    assert not out.proxy_B.requires_grad


def test_differentiable_score_sums_proxies_with_gradient() -> None:
    images, prompts = clean(5, 41)
    images.requires_grad_()
    shape = build("tiny_shape", floor=-100.0, weight=3.0)
    panel = Panel(
        {
            "shape": shape,
            "light": build(BRIGHTNESS, weight=0.5),
            "ignored": build(BRIGHTNESS, "auxiliary", weight=1000.0),
        }
    )
    total = panel.differentiable_score(images, prompts)
    (gradient,) = torch.autograd.grad(total.sum(), images)
    expected = 3.0 * shape.score(images, prompts) + 0.5 * images.mean((1, 2, 3))
    (wanted,) = torch.autograd.grad(expected.sum(), images)
    assert torch.allclose(total, expected)
    assert torch.allclose(gradient, wanted, atol=1e-7)
    assert math.isclose(float(gradient.sum()), float(wanted.sum()), rel_tol=1e-4, abs_tol=1e-4)


def test_a_held_out_reward_is_scored_where_it_is_reported() -> None:
    images, prompts = clean(2, 36)
    panel = Panel({"light": build(BRIGHTNESS), "rare": build(BRIGHTNESS, "held_out", every=3)})
    index_B = torch.arange(len(images))
    seen = [
        set(panel(images, prompts, sample_B=index_B, group_B=index_B, step=step).rewards)
        for step in range(4)
    ]
    assert seen == [{"light", "rare"}, {"light"}, {"light"}, {"light", "rare"}]


@pytest.mark.parametrize("role", ["proxy", "auxiliary", "features"])
def test_what_training_needs_is_scored_every_time(role: str) -> None:
    with pytest.raises(ValueError, match=f"every: 3: a reward of role {role} is needed in every"):
        Settings(kind="light", role=role, every=3)

"""The rewards of the tiny world and the panel that scores them together."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gardo import plugins
from gardo.rewards import _pixels, dinov3, tiny_count, tiny_patches
from gardo.rewards.base import Panel, Reward
from gardo.rewards.tiny_fidelity import TinyFidelity
from gardo.rewards.tiny_shape import TinyShape
from gardo.settings import model_path
from gardo.tiny import judges, make, world

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


# ---- counting ------------------------------------------------------------------------------------


def slow_count(mask: list[list[bool]], least: int) -> int:
    """8-connected patches of at least `least` pixels, by flood fill."""
    left = {(y, x) for y, row in enumerate(mask) for x, on in enumerate(row) if on}
    count = 0
    while left:
        stack, area = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            area += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
        count += area >= least
    return count


@pytest.mark.parametrize("least", [1, 3, 6])
@pytest.mark.parametrize("density", [0.15, 0.3, 0.6])
def test_patches_match_flood_fill(density: float, least: int) -> None:
    generator = torch.Generator().manual_seed(int(100 * density) + least)
    mask_BHW = torch.rand(24, 11, 17, generator=generator) < density
    expected = [slow_count(mask, least) for mask in mask_BHW.tolist()]
    assert max(expected) > 0
    assert tiny_patches.count_patches(mask_BHW, least).tolist() == expected


def test_a_long_winding_patch_is_one() -> None:
    spiral = torch.zeros(1, 16, 16, dtype=torch.bool)
    spiral[0, ::2] = True
    spiral[0, 1::4, -1] = True
    spiral[0, 3::4, 0] = True
    assert tiny_patches.count_patches(spiral, 4).tolist() == [1]
    assert slow_count(spiral[0].tolist(), 4) == 1
    cut = spiral.clone()
    cut[0, 5, -1] = False
    assert tiny_patches.count_patches(cut, 4).tolist() == [2]


def test_count_is_exact_on_clean_pictures() -> None:
    """Always for circles; in 1 % of the others corners touch (see test_world)."""
    images, prompts = clean(1500, 21)
    exact_B = score("tiny_patches", images, prompts) == 1
    circle_B = torch.tensor(["circle" in p for p in prompts])
    assert bool(exact_B[circle_B].all())
    assert float(exact_B.float().mean()) > 0.98


@pytest.mark.parametrize("shown", [0, 1, 2, 3])
@pytest.mark.parametrize("asked", [1, 2, 3])
def test_count_falls_with_the_error(shown: int, asked: int) -> None:
    picture = boxes([(2, 2), (12, 20), (24, 6)][:shown], 5, world.HUES["blue"])
    prompt = world.caption(asked, world.COLOURS.index("blue"), 1)
    (value,) = score("tiny_patches", picture, [prompt]).tolist()
    assert value == pytest.approx(1 / (1 + abs(shown - asked)))


def test_count_sees_only_the_colour_that_was_asked() -> None:
    picture = boxes([(2, 2), (12, 20)], 5, world.HUES["blue"])
    assert score("tiny_patches", picture, ["two red squares"]).tolist() == [pytest.approx(1 / 3)]
    assert score("tiny_patches", picture, ["two blue squares"]).tolist() == [1]


def test_small_patches_do_not_count() -> None:
    specks = boxes([(4, 4), (20, 20)], 2, world.HUES["green"])
    prompt = ["two green circles"]
    assert score("tiny_patches", specks, prompt, min_pixels=4).tolist() == [1]
    assert score("tiny_patches", specks, prompt, min_pixels=5).tolist() == [pytest.approx(1 / 3)]


def test_specks_count_as_patches() -> None:
    """The patch counter is no judge of shape either: specks of 2 x 2 pixels earn full marks."""
    cheats, prompts = [], world.prompts()
    for count, colour, _ in map(world.parse, prompts):
        hue = world.HUES[world.COLOURS[colour]]
        cheats.append(boxes([(5, 6), (22, 9), (14, 25)][:count], 2, hue))
    images = torch.cat(cheats)
    assert score("tiny_patches", images, prompts).tolist() == [1.0] * 54
    assert float(score("tiny_fidelity", images, prompts).mean()) < 0.2


def test_object_areas_are_those_of_the_world() -> None:
    scene = world.sample_scenes(6000, torch.Generator().manual_seed(22))
    hues = torch.tensor(list(world.HUES.values()))
    area_B = tiny_count.coloured_area(world.draw(scene), hues[scene.colour_B]) / scene.count_B
    for index, shape in enumerate(world.SHAPES):
        mean = float(area_B[scene.shape_BK[:, 0] == index].mean())
        assert mean == pytest.approx(tiny_count.OBJECT_AREA[shape], rel=0.03)


def test_count_by_area_falls_with_the_error() -> None:
    """Pure blue pixels: 53 count as one square, 106 as two, none as none."""
    pictures = torch.zeros(3, 3, 32, 32)
    pictures[1, 2].view(-1)[:53] = 1
    pictures[2, 2].view(-1)[:106] = 1
    for asked, expected in ((1, [0, 1, 0]), (2, [0, 0.5, 1]), (3, [0, 1 / 3, 2 / 3])):
        prompt = world.caption(asked, world.COLOURS.index("blue"), 1)
        assert score("tiny_count", pictures, [prompt] * 3).tolist() == pytest.approx(expected)
    assert score("tiny_count", pictures[1:2], ["one red square"]).tolist() == pytest.approx([0])


def test_count_can_be_cheated_and_others_see_it() -> None:
    """One stripe of the right area earns full marks, shows no shape, and is one patch."""
    cheats, prompts = [], [p for p in world.prompts() if not p.startswith("one")]
    for count, colour, shape in map(world.parse, prompts):
        picture = torch.zeros(3, 32, 32)
        pixels = round(count * tiny_count.OBJECT_AREA[world.SHAPES[shape]])
        rgb = world.hsv_to_rgb(
            torch.tensor(list(world.HUES.values())[colour]), torch.ones(()), torch.ones(())
        )
        picture.flatten(1)[:, 320 : 320 + pixels] = rgb[:, None]
        cheats.append(picture)
    images = torch.stack(cheats)
    assert float(score("tiny_count", images, prompts).min()) > 0.97
    assert float(score("tiny_patches", images, prompts).max()) <= 0.5
    assert float(score("tiny_fidelity", images, prompts).mean()) < 0.3


# ---- colour --------------------------------------------------------------------------------------


def test_purity_is_the_share_of_the_colour() -> None:
    red = boxes([(4, 4)], 6, world.HUES["red"])
    half = red + boxes([(20, 20)], 6, world.HUES["cyan"])
    other = boxes([(4, 4)], 6, world.HUES["cyan"])
    black, grey = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    images = torch.cat([red, half, other, black, grey])
    values = score("tiny_purity", images, ["one red square"] * 5)
    assert values.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.0])


def test_purity_weighs_by_colourfulness() -> None:
    """A quarter of the area in another colour, at half the brightness: 3 / (3 + 1/2)."""
    picture = boxes([(0, 0), (8, 8), (16, 16)], 6, world.HUES["red"])
    picture = picture + 0.5 * boxes([(24, 24)], 6, world.HUES["green"])
    (value,) = score("tiny_purity", picture, ["one red square"]).tolist()
    assert value == pytest.approx(3 / 3.5, abs=1e-5)


def test_purity_stays_between_0_and_1() -> None:
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(22))
    values = score("tiny_purity", noise, ["two blue circles"] * 64)
    assert float(values.min()) > 0 and float(values.max()) < 0.4
    assert float(score("tiny_purity", *clean(300, 23)).min()) > 0.95


# ---- the judges ----------------------------------------------------------------------------------


def test_shape_judge_is_right_on_clean_pictures() -> None:
    images, prompts = clean(1500, 24)
    judge: TinyShape = build("tiny_shape", "auxiliary")
    shape_B = torch.tensor([world.parse(p)[2] for p in prompts])
    assert float((judge.net(images).argmax(-1) == shape_B).float().mean()) > 0.97


def test_shape_gradient_reaches_the_pixels() -> None:
    images, prompts = clean(8, 25)
    images.requires_grad_()
    values = build("tiny_shape", floor=-100.0).score(images, prompts)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.abs().amax((1, 2, 3)) > 0).all())


def test_shape_is_a_log_probability_with_a_floor() -> None:
    images, _ = clean(40, 26)
    prompts = [[f"one red {s}"] * 40 for s in world.SHAPES]
    per_shape = [score("tiny_shape", images, p, floor=-1000.0).exp() for p in prompts]
    assert torch.allclose(sum(per_shape, torch.zeros(40)), torch.ones(40), atol=1e-5)
    floored = score("tiny_shape", images, prompts[0], floor=-0.5)
    assert float(floored.min()) == -0.5 and float(floored.max()) > -0.5


def test_fidelity_tells_clean_from_corrupted() -> None:
    images, prompts = clean(600, 27)
    assert float(score("tiny_fidelity", images, prompts).mean()) > 0.85
    judge: TinyFidelity = build("tiny_fidelity", "held_out")
    broken = make.corrupted(600, seed=28)
    accepted = 1 - judge.net(broken).softmax(-1)[:, judges.REJECTED]
    assert float(accepted.mean()) < 0.2
    assert float(score("tiny_fidelity", broken, prompts).mean()) < 0.1


def test_fidelity_is_low_for_another_prompt() -> None:
    images, prompts = clean(300, 29)
    asked = [world.parse(p) for p in prompts]
    colour = [world.caption(n, (c + 1) % 6, s) for n, c, s in asked]
    shape = [world.caption(n, c, (s + 1) % 3) for n, c, s in asked]
    assert float(score("tiny_fidelity", images, colour).mean()) < 0.1
    assert float(score("tiny_fidelity", images, shape).mean()) < 0.1


def test_fidelity_does_not_judge_the_count() -> None:
    images, prompts = clean(20, 30)
    recounted = [world.caption(n % 3 + 1, c, s) for n, c, s in map(world.parse, prompts)]
    assert torch.equal(
        score("tiny_fidelity", images, prompts), score("tiny_fidelity", images, recounted)
    )


@pytest.mark.parametrize(
    "kind", ["tiny_count", "tiny_patches", "tiny_purity", "tiny_shape", "tiny_fidelity"]
)
def test_prompts_that_cannot_be_scored_are_refused(kind: str) -> None:
    plugin = plugins.resolve("gardo.rewards", kind)
    plugin.check_prompt("two red circles")
    with pytest.raises(ValueError, match="'pink' is none of red"):
        plugin.check_prompt("two pink circles")


# ---- DINOv3 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features() -> dinov3.Dinov3:
    return build("dinov3", "features", path="builtin:dinov3", size=32)


def test_preprocessing_without_resizing_normalises() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(31))
    out = dinov3.preprocess(images, 32)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert torch.allclose(out[:, channel], (images[:, channel] - mean) / std, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(32, 48), (64, 32)])
def test_resizing_is_pillows_antialiased_bicubic(before: int, after: int) -> None:
    bytes_HW3 = torch.randint(
        256, (before, before, 3), generator=torch.Generator().manual_seed(32), dtype=torch.uint8
    )
    resized = Image.fromarray(bytes_HW3.numpy()).resize((after, after), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(resized.tobytes())).view(after, after, 3) / 255
    out = dinov3.preprocess(bytes_HW3.permute(2, 0, 1)[None] / 255, after)[0].permute(1, 2, 0)
    mean, std = (torch.tensor(values) for values in _pixels.IMAGENET)
    out = out * std + mean
    assert out.shape == (after, after, 3)
    assert float((out - expected).abs().mean()) < 0.004
    assert float(out.min()) >= -1e-6 and float(out.max()) <= 1 + 1e-6


def test_feature_is_the_mean_patch_token_after_the_norm(features: dinov3.Dinov3) -> None:
    images, prompts = clean(3, 33)
    normed: list[Tensor] = []
    handle = features.model.norm.register_forward_hook(lambda *_: normed.append(_[2]))
    values = features.score(images, prompts)
    handle.remove()
    tokens = normed[-1]
    assert tokens.shape == (3, 2 + 64, 48)  # class token, register, 8 x 8 patches
    assert values.shape == (3, 48)
    assert torch.allclose(values, tokens[:, -64:].mean(1), atol=1e-6)
    assert not torch.allclose(values, tokens[:, 0], atol=1e-2)
    assert not torch.allclose(values, tokens[:, 1:].mean(1), atol=1e-4)


def test_features_place_layouts_together(features: dinov3.Dinov3) -> None:
    """Same objects: a picture is nearer to itself moved by a pixel than to another layout."""
    scene = world.sample_scenes(200, torch.Generator().manual_seed(34))
    other = world.sample_scenes(200, torch.Generator().manual_seed(34))
    generator = torch.Generator().manual_seed(35)
    shift = torch.randint(-1, 2, (200, 1, 2), generator=generator).float()
    moved = world.draw(
        world.Scene(**{**vars(scene), "centre_BK2": (scene.centre_BK2 + shift).clamp(4, 28)})
    )
    elsewhere = world._place(other.radius_BK, other.count_B, generator)
    replaced = world.draw(world.Scene(**{**vars(other), "centre_BK2": elsewhere}))
    a, near, far = (
        torch.nn.functional.normalize(features.score(x, []), dim=-1)
        for x in (world.draw(scene), moved, replaced)
    )
    closer = (a * near).sum(-1) > (a * far).sum(-1)
    assert float(closer.float().mean()) > 0.9


def altered(folder: Path, changes: dict[str, Tensor | None]) -> str:
    """The built-in DINOv3 with weights of another value, or without those that are None."""
    source = Path(model_path("builtin:dinov3"))
    shutil.copy(source / "config.json", folder)
    state = load_file(source / "model.safetensors") | changes
    kept = {name: weight for name, weight in state.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, "lacks norm.weight; is it a whole DINOv3ViTModel of this size"),
        ({"norm.bias": None, "norm.weight": None}, "lacks norm.bias and 1 more;"),
        ({"norm.weight": torch.ones(3)}, "has another shape of norm.weight;"),
        ({"head.weight": torch.ones(3)}, "also has head.weight;"),
    ],
)
def test_a_dinov3_that_is_not_whole_is_refused(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        build("dinov3", "features", path=altered(tmp_path, changes), size=32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_of_a_smaller_type_are_float32(features: dinov3.Dinov3, dtype: str) -> None:
    """Tokens are rounded to 8 bits (bf16); their mean is taken in fp32, and is nearer."""
    small = build("dinov3", "features", path="builtin:dinov3", size=32, dtype=dtype)
    assert {p.dtype for p in small.model.parameters()} == {getattr(torch, dtype)}
    images, prompts = clean(6, 36)
    values = small.score(images, prompts)
    exact = features.score(images, prompts)
    assert values.dtype == exact.dtype == torch.float32
    assert float((values - exact).norm(dim=-1).max()) < 2**-6 * float(exact.norm(dim=-1).min())


# ---- the panel -----------------------------------------------------------------------------------

USERS_REWARD = """
import torch
from gardo.rewards.base import Reward, RewardSettings

class Settings(RewardSettings):
    nan_at: int | None = None
    infinite_at: int | None = None

class Brightness(Reward):
    Settings = Settings
    differentiable = True

    def score(self, images_B3HW, prompts):
        values = images_B3HW.mean((1, 2, 3))
        for at in (self.settings.nan_at, self.settings.infinite_at):
            if at is not None:
                values = values.clone()
                values[at] = float("nan" if at == self.settings.nan_at else "inf")
        return values
"""
BRIGHTNESS = "gardo_test_brightness:Brightness"


@pytest.fixture(autouse=True)
def _users_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gardo_test_brightness.py").write_text(USERS_REWARD)
    monkeypatch.syspath_prepend(tmp_path)


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
    ],
)
def test_a_value_of_another_shape_is_told(given: Any, said: str) -> None:
    images, prompts = clean(4, 38)
    reward = build("tiny_purity")
    reward.score = lambda images_B3HW, prompts: given
    with pytest.raises(ValueError, match=rf"TinyPurity.score gave {said}; .* a tensor \[4\], NaN"):
        panel_scores(images, prompts, purity=reward)


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

"""Evaluation: labels from pixels, and the evaluator on the built-in tiny Flux."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from gardo import plugins
from gardo.distributed.local import LocalEngine
from gardo.distributed.optimizers import OptimizerSettings
from gardo.evaluation.attributes import attribute_labels
from gardo.evaluation.evaluate import EvaluateSettings, Evaluator, due
from gardo.evaluation.statistics import bootstrap_mean, entropy, paired_change
from gardo.policies.flux import FluxPolicy, FluxSettings
from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.panel import Panel
from gardo.tiny import world
from gardo.types import Prompt

CPU = torch.device("cpu")
PROMPTS = ["two blue squares", "one red circle", "three green triangles", "one cyan square"]

# ---- labels --------------------------------------------------------------------------------------


def squares(*places: tuple[int, int], size: int = 6, hue: float = 1 / 3) -> Tensor:
    """[1, 3, 32, 32]: black, with squares of one hue whose corners are at (y, x)."""
    picture = torch.zeros(1, 3, 32, 32)
    rgb = world.hsv_to_rgb(torch.tensor(hue % 1.0), torch.tensor(1.0), torch.tensor(0.9))
    for y, x in places:
        picture[0, :, y : y + size, x : x + size] = rgb[:, None, None]
    return picture


def label(name: str, picture: Tensor, prompt: str = "one green square") -> int:
    labels = attribute_labels(picture, [prompt])
    assert set(labels) == {"layout", "size", "hue"}
    assert all(v.dtype == torch.int64 and v.shape == (1,) for v in labels.values())
    return int(labels[name])


@pytest.mark.parametrize("cell", range(9))
def test_layout_has_a_bit_for_each_cell(cell: int) -> None:
    row, column = divmod(cell, 3)
    assert label("layout", squares((2 + 11 * row, 2 + 11 * column))) == 1 << cell


def test_layout_adds_cells_and_ignores_specks() -> None:
    assert label("layout", squares((2, 2), (24, 24))) == 0b100000001
    assert label("layout", squares((2, 2), size=3)) == 0
    assert label("layout", squares()) == 0


def test_size_is_the_area_of_an_object() -> None:
    assert label("size", squares((2, 2))) == 36 // 12
    assert label("size", squares((2, 2), (20, 20)), "two green squares") == 36 // 12
    assert label("size", squares((2, 2), (20, 20)), "one green square") == 72 // 12
    assert label("size", squares((2, 2), size=8)) == 64 // 12


@pytest.mark.parametrize("deviation", [0.04, 0.01, 0.0, -0.01, -0.04])
@pytest.mark.parametrize("colour", ["red", "green", "magenta"])
def test_hue_deviates_with_its_sign(colour: str, deviation: float) -> None:
    """Red lies at 0: its deviations go around the circle."""
    picture = squares((4, 4), (20, 20), hue=world.HUES[colour] + deviation)
    assert label("hue", picture, f"two {colour} squares") == round(100 * deviation)


def test_hue_averages_over_the_objects() -> None:
    picture = squares((4, 4), hue=1 / 3 + 0.06) + squares((20, 20), hue=1 / 3 - 0.02)
    assert label("hue", picture, "two green squares") == 2


def test_entropy_falls_when_layouts_collapse() -> None:
    places = [(2 + 11 * row, 2 + 11 * column) for row in range(3) for column in range(3)]
    varied = torch.cat([squares(place) for place in places])
    collapsed = torch.cat([squares(places[4], hue=1 / 3 + d / 200) for d in range(-4, 5)])
    prompts = ["one green square"] * 9
    first, last = attribute_labels(varied, prompts), attribute_labels(collapsed, prompts)
    assert entropy(first["layout"]) == pytest.approx(math.log(9))
    assert entropy(last["layout"]) == 0
    assert entropy(first["hue"]) == 0 and entropy(last["hue"]) > 1


def test_due_at_every_so_many_and_at_the_end() -> None:
    assert [step for step in range(1, 8) if due(step, 7, 3)] == [3, 6, 7]
    assert [step for step in range(1, 7) if due(step, 6, 3)] == [3, 6]
    assert [step for step in range(1, 4) if due(step, 3, 50)] == [3]


# ---- the evaluator -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> FluxPolicy:
    settings = FluxSettings(path="builtin:flux", size=(32, 32), text_tokens=8)
    policy = FluxPolicy(settings, dtype=torch.float32, device=CPU)
    policy.train_lora(rank=2, alpha=4, targets=None, seed=1)
    return policy


def reward(kind: str, role: str, **more: Any) -> Reward:
    plugin = plugins.resolve("gardo.rewards", kind)
    return plugin(plugin.Settings(role=role, **more), CPU)


@pytest.fixture(scope="module")
def panel() -> Panel:
    return Panel(
        {
            "tiny_count": reward("tiny_count", "proxy"),
            "tiny_purity": reward("tiny_purity", "held_out"),
            "dinov3": reward("dinov3", "features", path="builtin:dinov3", size=32),
        }
    )


def evaluator(
    policy: FluxPolicy,
    panel: Panel,
    folder: Path,
    *,
    seed: int = 42,
    prompts: Sequence[str] = PROMPTS,
    **more: Any,
) -> Evaluator:
    settings = {"images_per_prompt": 2, "steps": 2, "batch": 8, "diversity": "attributes", **more}
    engine = LocalEngine(
        policy.trainable(),
        optimizer=OptimizerSettings(),
        accumulation=1,
        max_grad_norm=1.0,
        device=CPU,
    )
    return Evaluator(
        policy, panel, engine, prompts, EvaluateSettings(**settings), seed=seed, folder=folder
    )


def test_images_depend_on_seed_and_index_alone(
    policy: FluxPolicy, panel: Panel, tmp_path: Path
) -> None:
    ours = evaluator(policy, panel, tmp_path)
    everything = torch.arange(8)
    images, prompts = ours.batch(everything)
    assert images.shape == (8, 3, 32, 32)
    assert prompts == [p for p in PROMPTS for _ in range(2)]
    assert torch.equal(ours.batch(everything)[0], images)
    order = torch.tensor([6, 1, 3])
    some, their_prompts = ours.batch(order)
    assert torch.allclose(some, images[order], atol=1e-5)
    assert their_prompts == [prompts[i] for i in order]
    assert not torch.allclose(images[0], images[1], atol=0.05)  # noise of its own
    other = evaluator(policy, panel, tmp_path, seed=43).batch(everything)[0]
    assert not torch.allclose(other, images, atol=0.05)


def test_a_record_holds_what_was_seen(policy: FluxPolicy, panel: Panel, tmp_path: Path) -> None:
    ours = evaluator(policy, panel, tmp_path, shown=3)
    record = ours(20)
    assert (record["kind"], record["step"]) == ("evaluation", 20)
    assert (record["image_count"], record["prompt_count"]) == (8, 4)
    assert record["prompts"] == PROMPTS[:3]
    images, prompts = ours.batch(torch.arange(8))
    assert set(record["rewards"]) == {"tiny_count", "tiny_purity"}
    for name, role in (("tiny_count", "proxy"), ("tiny_purity", "held_out")):
        by_image = panel.rewards[name].score(images, prompts)
        by_prompt = by_image.view(4, 2).mean(1)
        assert record["by_prompt"][name] == pytest.approx(by_prompt.tolist(), abs=1e-5)
        seen = record["rewards"][name]
        interval = bootstrap_mean(by_prompt)  # the unit is the prompt
        assert seen["mean"] == pytest.approx(interval.mean, abs=1e-5)
        assert seen["low"] == pytest.approx(interval.low, abs=1e-4)
        assert seen["high"] == pytest.approx(interval.high, abs=1e-4)
        assert seen["role"] == role
    labels = attribute_labels(images, prompts)
    assert record["diversity"] == pytest.approx({n: entropy(v) for n, v in labels.items()})


def test_a_sample_picture_is_written(policy: FluxPolicy, panel: Panel, tmp_path: Path) -> None:
    """A row for each shown prompt, in pixels of 2 x 2 with gaps of 2; also across batches."""
    ours = evaluator(policy, panel, tmp_path, shown=3, batch=5)
    assert ours(7)["images"] == "samples/step-00007.png"
    picture = Image.open(tmp_path / "samples/step-00007.png")
    assert picture.size == (2 * 66 + 2, 3 * 66 + 2)
    pixels = torch.tensor(list(picture.tobytes())).view(200, 134, 3) / 255
    images, _ = ours.batch(torch.arange(6))
    for index in range(6):
        y, x = 2 + 66 * (index // 2), 2 + 66 * (index % 2)
        shown = pixels[y : y + 64 : 2, x : x + 64 : 2].permute(2, 0, 1)
        assert torch.allclose(shown, images[index], atol=1.5 / 255)


@pytest.mark.parametrize("batch", [3, 8, 20])
def test_the_batch_changes_nothing(
    batch: int, policy: FluxPolicy, panel: Panel, tmp_path: Path
) -> None:
    """Also where it does not divide the images: what is past the end is dropped."""
    record = evaluator(policy, panel, tmp_path, batch=batch)(0)
    expected = evaluator(policy, panel, tmp_path, batch=4)(0)
    assert record["image_count"] == 8
    for name in ("tiny_count", "tiny_purity"):
        assert record["by_prompt"][name] == pytest.approx(expected["by_prompt"][name], abs=1e-5)
    assert record["diversity"] == pytest.approx(expected["diversity"])


def test_change_is_paired_with_the_first_evaluation(
    policy: FluxPolicy, panel: Panel, tmp_path: Path
) -> None:
    ours = evaluator(policy, panel, tmp_path)
    first, again = ours(0), ours(1)
    none = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert first["change"] == again["change"] == {"tiny_count": none, "tiny_purity": none}
    assert again["by_prompt"] == first["by_prompt"]
    up = [p for n, p in policy.trainable().items() if "lora_B" in n]
    kept = [p.detach().clone() for p in up]
    try:
        with torch.no_grad():
            for parameter in up:
                generator = torch.Generator().manual_seed(3)
                parameter.normal_(0.0, 0.3, generator=generator)
        moved = ours(2)
    finally:
        with torch.no_grad():
            for parameter, values in zip(up, kept, strict=True):
                parameter.copy_(values)
    for name in ("tiny_count", "tiny_purity"):
        before, after = (torch.tensor(record["by_prompt"][name]) for record in (first, moved))
        change = paired_change(before, after)
        expected = {"mean": change.mean, "low": change.low, "high": change.high}
        assert moved["change"][name] == pytest.approx(expected, abs=1e-6)
        assert change.mean == pytest.approx(float((after - before).mean()), abs=1e-6)
    assert moved["change"]["tiny_purity"]["mean"] != 0
    assert ours(3)["change"]["tiny_purity"] == none


def test_feature_diversity_is_within_a_prompt(
    policy: FluxPolicy, panel: Panel, tmp_path: Path
) -> None:
    """100 x the mean pairwise cosine distance of a prompt's images."""
    ours = evaluator(policy, panel, tmp_path, diversity="features")
    features = panel.rewards["dinov3"].score(*ours.batch(torch.arange(8))).view(4, 2, -1)
    cosine = torch.nn.functional.cosine_similarity(features[:, 0], features[:, 1], dim=-1)
    record = ours(0)
    assert set(record["diversity"]) == {"features"}
    assert record["diversity"]["features"] == pytest.approx(
        100 * float((1 - cosine).mean()), rel=1e-3, abs=1e-3
    )


def test_no_diversity_unless_asked(policy: FluxPolicy, panel: Panel, tmp_path: Path) -> None:
    record = evaluator(policy, panel, tmp_path, diversity="none", prompts=PROMPTS[:2])(0)
    assert record["diversity"] == {}
    assert set(record["rewards"]) == {"tiny_count", "tiny_purity"}


class Failing(Reward):
    """The mean brightness; nothing for red, one of two images for blue."""

    Settings = RewardSettings

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        failed = [
            "red" in p or ("blue" in p and "blue" not in " ".join(prompts[:i]))
            for i, p in enumerate(prompts)
        ]
        return images_B3HW.mean((1, 2, 3)).where(~torch.tensor(failed), torch.nan)


def test_failed_rewards_are_left_out(policy: FluxPolicy, tmp_path: Path) -> None:
    """A failed image leaves its prompt's mean, a failed prompt the record's; neither is a zero."""
    failing = Failing(RewardSettings(kind="failing", role="proxy"), CPU)
    ours = evaluator(policy, Panel({"failing": failing}), tmp_path, diversity="none")
    record = ours(0)
    light = ours.batch(torch.arange(8))[0].mean((1, 2, 3)).view(4, 2)
    by_prompt = record["by_prompt"]["failing"]
    assert by_prompt[0] == pytest.approx(float(light[0, 1]), abs=1e-5)
    assert math.isnan(by_prompt[1])
    assert by_prompt[2:] == pytest.approx(light[2:].mean(1).tolist(), abs=1e-5)
    seen = record["rewards"]["failing"]["mean"]
    assert seen == pytest.approx((by_prompt[0] + by_prompt[2] + by_prompt[3]) / 3)

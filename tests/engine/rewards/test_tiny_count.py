"""The tiny world's counters: by patches, and by area, which can be cheated."""

from __future__ import annotations

import pytest
import torch

from gardo.rewards import tiny_count, tiny_patches
from gardo.tiny import world
from tests.engine.rewards.tiny_pictures import boxes, clean, score


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
    images, prompts = clean(500, 21)
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
    scene = world.sample_scenes(1500, torch.Generator().manual_seed(22))
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


def test_objects_of_twice_the_area_are_asked_for() -> None:
    """106 blue pixels are one square then; good pictures earn half, and hardly any nearly all."""
    picture = torch.zeros(1, 3, 32, 32)
    picture[0, 2].view(-1)[:106] = 1
    asked = [world.caption(1, world.COLOURS.index("blue"), 1)]
    assert score("tiny_count", picture, asked, object_area=2.0).tolist() == pytest.approx([1])
    good = score("tiny_count", *clean(500, 23), object_area=2.0)
    assert float(good.mean()) == pytest.approx(0.5, abs=0.03)
    assert float((good > 0.9).float().mean()) < 0.03


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

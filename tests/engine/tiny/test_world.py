"""The tiny world: what a caption says is what the picture shows."""

from __future__ import annotations

import colorsys
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from gardo.tiny import world


def scenes(count: int, seed: int = 0, *, mixed: bool = False) -> world.Scene:
    return world.sample_scenes(count, torch.Generator().manual_seed(seed), mixed=mixed)


def one_object(shape: int, radius: float) -> world.Scene:
    """A red object in the middle of a picture."""
    return world.Scene(
        count_B=torch.tensor([1]),
        colour_B=torch.tensor([0]),
        shape_BK=torch.full((1, 3), shape),
        centre_BK2=torch.full((1, 3, 2), 16.0),
        radius_BK=torch.full((1, 3), radius),
        rgb_BK3=torch.tensor([1.0, 0.0, 0.0]).expand(1, 3, 3),
        ground_B=torch.tensor([0.1]),
    )


def coverage(scene: world.Scene) -> Tensor:
    """[B, H, W]: how much of each pixel an object covers, told from white objects on black."""
    white = replace(
        scene,
        rgb_BK3=torch.ones_like(scene.rgb_BK3),
        ground_B=torch.zeros_like(scene.ground_B),
    )
    return world.draw(white)[:, 0]


def patches(mask: list[list[bool]]) -> int:
    """8-connected patches, by flood fill."""
    left = {(y, x) for y, row in enumerate(mask) for x, on in enumerate(row) if on}
    count = 0
    while left:
        count += 1
        stack = [left.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
    return count


def test_drawing_depends_on_the_generator_alone() -> None:
    first, again, other = scenes(16, 3), scenes(16, 3), scenes(16, 4)
    for field in fields(world.Scene):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name
    assert torch.equal(world.draw(first), world.draw(again))
    assert not torch.equal(world.draw(first), world.draw(other))


def test_pictures_are_float_rgb_between_0_and_1() -> None:
    pictures = world.draw(scenes(64))
    assert pictures.shape == (64, 3, world.SIZE, world.SIZE)
    assert pictures.dtype == torch.float32
    assert 0 <= float(pictures.min()) < 0.2 and 0.8 < float(pictures.max()) <= 1


def test_captions_round_trip() -> None:
    prompts = world.prompts()
    assert len(prompts) == len(set(prompts)) == 54
    for prompt in prompts:
        assert world.caption(*world.parse(prompt)) == prompt
    assert {world.parse(p) for p in prompts} == {
        (n, c, s) for n in (1, 2, 3) for c in range(6) for s in range(3)
    }


def test_parsing_forgives_case_and_spaces() -> None:
    assert world.parse("  Two RED  circles ") == (2, world.COLOURS.index("red"), 0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("four red circles", "'four' is none of one, two, three"),
        ("two pink circles", "'pink' is none of red, yellow, green, cyan, blue, magenta"),
        ("two red stars", "'star' is none of circle, square, triangle"),
        ("two red", "expected three words"),
        ("a photo of two red circles", "expected three words"),
        ("", "expected three words"),
    ],
)
def test_parsing_names_the_unknown_word(prompt: str, expected: str) -> None:
    with pytest.raises(ValueError, match="prompt ") as raised:
        world.parse(prompt)
    assert expected in str(raised.value)
    assert repr(prompt) in str(raised.value)


def test_captions_say_what_was_sampled() -> None:
    scene = scenes(100, 5)
    for i, text in enumerate(world.captions(scene)):
        count, colour, shape = world.parse(text)
        assert count == int(scene.count_B[i])
        assert colour == int(scene.colour_B[i])
        assert [shape] * 3 == scene.shape_BK[i].tolist()


def test_all_counts_colours_and_shapes_are_drawn_evenly() -> None:
    captions = world.captions(scenes(2700, 6))
    seen = [captions.count(p) for p in world.prompts()]
    assert min(seen) > 22 and max(seen) < 78  # 50 expected, four standard deviations of 7


def test_objects_keep_apart_and_inside() -> None:
    """Circles of the objects' radius neither touch nor leave the picture."""
    scene = scenes(600, 7)
    used_BK = torch.arange(3) < scene.count_B[:, None]
    margin_BK2 = scene.radius_BK[..., None].expand(-1, -1, 2)[used_BK]
    centre = scene.centre_BK2[used_BK]
    assert bool((centre >= margin_BK2).all()) and bool((centre <= 32 - margin_BK2).all())
    apart_BKK = torch.cdist(scene.centre_BK2, scene.centre_BK2)
    reach_BKK = scene.radius_BK[:, :, None] + scene.radius_BK[:, None, :]
    both_BKK = used_BK[:, :, None] & used_BK[:, None, :] & ~torch.eye(3, dtype=torch.bool)
    assert int(both_BKK.sum()) > 1000
    assert bool((apart_BKK > reach_BKK + 1)[both_BKK].all())


def test_pictures_show_as_many_patches_as_the_caption_says() -> None:
    """Circles always; corners reach beyond the radius, so 1 % of the others touch."""
    scene = scenes(400, 8)
    masks = (coverage(scene) > 0.5).tolist()
    pairs = zip(masks, scene.count_B.tolist(), strict=True)
    wrong_B = torch.tensor([patches(mask) != count for mask, count in pairs])
    circle_B = scene.shape_BK[:, 0] == world.SHAPES.index("circle")
    assert int(wrong_B[circle_B].sum()) == 0
    assert int(wrong_B.sum()) < 12


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", 3.14159),
        ("square", (2 * 0.86) ** 2),
        ("triangle", 1.95 * 1.95 / 3**0.5),  # equilateral, from -1.2 r to 0.75 r
    ],
)
@pytest.mark.parametrize("radius", [4.0, 6.0])
def test_shapes_have_their_area(shape: str, area: float, radius: float) -> None:
    covered = coverage(one_object(world.SHAPES.index(shape), radius))
    assert float(covered.sum()) == pytest.approx(area * radius**2, rel=0.03)


def test_objects_lie_on_the_ground_in_their_colour() -> None:
    picture = world.draw(one_object(0, 5.0))[0]
    assert torch.allclose(picture[:, 16, 16], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(picture[:, 1, 1], torch.full((3,), 0.1))


def test_hues_stay_near_the_named_colour() -> None:
    scene = scenes(300, 9)
    hue, saturation, value = world.rgb_to_hsv(scene.rgb_BK3[:, 0, :, None, None])
    named = torch.tensor(list(world.HUES.values()))[scene.colour_B]
    distance = world.hue_distance(hue[:, 0, 0], named)
    assert float(distance.max()) < world.HUE_JITTER + 1e-4
    assert float(distance.max()) > 0.8 * world.HUE_JITTER
    assert float(saturation.min()) > 0.79 and float(value.min()) > 0.79


def test_hsv_and_rgb_are_inverse() -> None:
    generator = torch.Generator().manual_seed(10)
    hue, saturation, value = torch.rand(3, 4, 8, 8, generator=generator)
    saturation, value = 0.1 + 0.9 * saturation, 0.1 + 0.9 * value
    rgb_B3HW = world.hsv_to_rgb(hue, saturation, value).movedim(-1, 1)
    again = world.rgb_to_hsv(rgb_B3HW)
    assert float(world.hue_distance(again[0], hue).max()) < 1e-5
    assert torch.allclose(again[1], saturation, atol=1e-5)
    assert torch.allclose(again[2], value, atol=1e-6)


def test_hsv_agrees_with_the_standard_library() -> None:
    rgb_N3 = torch.rand(200, 3, generator=torch.Generator().manual_seed(11))
    expected = torch.tensor([colorsys.rgb_to_hsv(*rgb) for rgb in rgb_N3.double().tolist()])
    hsv = torch.stack(world.rgb_to_hsv(rgb_N3[:, :, None, None]), -1)[:, 0, 0]
    assert torch.allclose(hsv.double(), expected.double(), atol=1e-4)


def test_grey_has_no_colour() -> None:
    grey = torch.tensor([0.0, 0.3, 1.0])[:, None, None, None].expand(3, 3, 1, 1)
    hue, saturation, value = (x.flatten().tolist() for x in world.rgb_to_hsv(grey))
    assert hue == [0, 0, 0] and saturation == [0, 0, 0]
    assert value == pytest.approx([0.0, 0.3, 1.0])


@pytest.mark.parametrize(
    ("hue", "other", "distance"), [(0.95, 0.05, 0.1), (0.2, 0.2, 0.0), (0.0, 0.5, 0.5)]
)
def test_hue_distance_goes_around_the_circle(hue: float, other: float, distance: float) -> None:
    a, b = torch.tensor(hue), torch.tensor(other)
    assert float(world.hue_distance(a, b)) == pytest.approx(distance, abs=1e-6)
    assert float(world.hue_distance(b, a)) == pytest.approx(distance, abs=1e-6)


def test_mixed_scenes_mix_and_plain_ones_do_not() -> None:
    def unlike(scene: world.Scene) -> tuple[float, float]:
        """Shares of the pictures with several objects that differ in shape, in colour."""
        several = scene.count_B > 1
        first_two = slice(0, 2)
        shape = scene.shape_BK[several][:, first_two]
        rgb = scene.rgb_BK3[several][:, first_two]
        return (
            float((shape[:, 0] != shape[:, 1]).float().mean()),
            float(((rgb[:, 0] - rgb[:, 1]).abs().amax(-1) > 0.3).float().mean()),
        )

    assert unlike(scenes(600, 12)) == (0.0, 0.0)
    shapes, colours = unlike(scenes(600, 12, mixed=True))
    assert shapes == pytest.approx(2 / 3, abs=0.1)
    assert colours == pytest.approx(5 / 6, abs=0.1)

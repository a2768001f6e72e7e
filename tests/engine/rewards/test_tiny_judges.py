"""The tiny world's judges of colour, shape and fidelity."""

from __future__ import annotations

import pytest
import torch

from gardo import plugins
from gardo.rewards.tiny_fidelity import TinyFidelity
from gardo.rewards.tiny_shape import TinyShape
from gardo.tiny import judges, make, world
from gardo.types import Prompt
from tests.engine.rewards.tiny_pictures import boxes, build, clean, score

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
    images, prompts = clean(500, 24)
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


def test_fidelity_accepts_clean_pictures() -> None:
    assert float(score("tiny_fidelity", *clean(300, 27)).mean()) > 0.9


@pytest.mark.parametrize("kind", range(6), ids=["mixed", "torn", "smeared", "bled", "comb", "blob"])
def test_fidelity_rejects_what_is_corrupted(kind: int) -> None:
    judge: TinyFidelity = build("tiny_fidelity", "held_out")
    broken = make.corrupted(6 * 100, seed=28).split(100)[kind]
    accepted = 1 - judge.net(broken).softmax(-1)[:, judges.REJECTED]
    assert float(accepted.mean()) < 0.1


def test_fidelity_rejects_holes_that_it_was_not_trained_on() -> None:
    """Round ones, in the middle of every object."""
    scene = world.sample_scenes(200, torch.Generator().manual_seed(29))
    axis = torch.arange(world.SIZE) + 0.5
    place_HW2 = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    away_BKHW = (place_HW2 - scene.centre_BK2[:, :, None, None]).norm(dim=-1)
    hole_BHW = (away_BKHW < 0.5 * scene.radius_BK[:, :, None, None]).any(1)
    ground = scene.ground_B[:, None, None, None]
    hollow = torch.where(hole_BHW[:, None], ground, world.draw(scene))
    assert float(score("tiny_fidelity", hollow, world.captions(scene)).mean()) < 0.15


def test_fidelity_is_low_for_another_prompt() -> None:
    images, prompts = clean(150, 29)
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
    "kind", [name for name in plugins.names("gardo.rewards") if name.startswith("tiny_")]
)
def test_prompts_that_cannot_be_scored_are_refused(kind: str) -> None:
    plugin = plugins.resolve("gardo.rewards", kind)
    plugin.check_prompt(Prompt("two red circles"))
    with pytest.raises(ValueError, match="'pink' is none of red"):
        plugin.check_prompt(Prompt("two pink circles"))


@pytest.mark.parametrize("kind", [n for n in plugins.names("gardo.rewards") if "tiny" in n])
def test_scores_do_not_depend_on_the_batch(kind: str) -> None:
    images, prompts = clean(8, 29)
    assert torch.allclose(
        score(kind, images, prompts, batch=3), score(kind, images, prompts), atol=1e-5
    )

"""How a recipe's batch splits over ranks, and which numbers are offered where it does not."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gardo.config import load
from gardo.planner import geometry
from gardo.planner.geometry import divisors
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from tests.engine.config.recipe import written


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load(written(tmp_path_factory.mktemp("good")))


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with fields of its sections replaced."""
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=fields)
            for name, fields in sections.items()
        }
    )


def nearest(message: str) -> list[int]:
    """The numbers that a message about geometry offers."""
    return [int(n) for n in re.findall(r"\d+", message.split("Nearest that do: ")[1])]


@pytest.mark.parametrize(
    ("prompts", "images", "updates", "ranks"),
    [(8, 12, 2, 5), (7, 3, 2, 4), (1, 2, 1, 64), (48, 24, 2, 7)],
)
def test_batches_that_do_not_split_are_told_what_would(
    prompts: int, images: int, updates: int, ranks: int, good: Recipe
) -> None:
    def recipe(prompts_per_step: int) -> Recipe:
        return changed(
            good,
            data={"prompts_per_step": prompts_per_step, "images_per_prompt": images},
            train={"updates_per_step": updates, "micro_batch": None},
        )

    with pytest.raises(RecipeError) as raised:
        geometry(recipe(prompts), rank=0, world=ranks, source="some.yaml")
    message = str(raised.value)
    assert message.startswith(
        f"some.yaml: data.prompts_per_step: {prompts} prompts x {images} images = "
        f"{prompts * images} do not split evenly over {ranks} ranks with {updates} updates a step. "
        "Nearest that do: prompts_per_step "
    )
    offered = nearest(message)
    assert len(offered) == 2
    for better in offered:
        plan = geometry(recipe(better), rank=0, world=ranks)
        assert plan.samples * ranks == better * images
    closest = min(abs(prompts - better) for better in offered)
    closer = range(max(1, prompts - closest + 1), prompts + closest)
    assert all(p * images % (ranks * updates) for p in closer)


@pytest.mark.parametrize("micro_batch", [5, 71, 200, 1000])
def test_micro_batches_that_do_not_divide_are_told_what_would(
    micro_batch: int, good: Recipe
) -> None:
    with pytest.raises(RecipeError) as raised:
        geometry(changed(good, train={"micro_batch": micro_batch}), rank=1, world=2)
    message = str(raised.value)
    assert message.startswith(
        f"recipe: train.micro_batch: {micro_batch} does not divide the 144 rows "
        "(24 samples x 6 steps) of an update on each of 2 ranks. Nearest that do: "
    )
    offered = nearest(message)
    assert len(offered) == 2
    for better in offered:
        plan = geometry(changed(good, train={"micro_batch": better}), rank=1, world=2)
        assert plan.micro_batch == better and plan.accumulation * better == 144


@pytest.mark.parametrize(
    ("batch", "micro_batch", "sampled", "rows"),
    [(None, 36, 36, 48), (None, 72, 48, 48), (7, 36, 7, 48), (100, 36, 48, 48),
     ("like_train", 36, 36, 72), ("like_train", 48, 48, 48), ("like_train", 72, 72, 72)],
)  # fmt: skip
def test_images_of_a_sampling_forward(
    batch: int | str | None, micro_batch: int, sampled: int, rows: int, good: Recipe
) -> None:
    """48 samples a rank; `like_train` fills calls up to a micro-batch, no other batch does."""
    recipe = changed(good, train={"micro_batch": micro_batch}, rollout={"batch": batch})
    plan = geometry(recipe, rank=0, world=2)
    assert (plan.sampled, plan.sampled_rows) == (sampled, rows)
    assert plan.fill == (batch == "like_train")


def test_all_of_an_update_goes_at_once_without_micro_batch(good: Recipe) -> None:
    plan = geometry(changed(good, train={"micro_batch": None}), rank=1, world=2)
    assert (plan.samples, plan.first, plan.rows, plan.micro_batch) == (48, 48, 144, 144)


@pytest.mark.parametrize(
    ("prompts", "images", "updates", "ranks"),
    [(100_000, 9_999, 7, 4096), (99_999, 10_000, 9_973, 64), (1, 1, 10_000, 8)],
)
def test_large_batches_are_told_at_once(
    prompts: int, images: int, updates: int, ranks: int, good: Recipe
) -> None:
    """What is offered is computed, not searched for."""
    recipe = changed(
        good,
        data={"prompts_per_step": prompts, "images_per_prompt": images},
        train={"updates_per_step": updates, "micro_batch": None},
    )
    started = time.process_time()
    with pytest.raises(RecipeError) as raised:
        geometry(recipe, rank=0, world=ranks)
    assert time.process_time() - started < 1
    for better in nearest(str(raised.value)):
        assert better * images % (ranks * updates) == 0


def test_a_large_micro_batch_is_told_at_once(good: Recipe) -> None:
    recipe = changed(
        good,
        data={"prompts_per_step": 100_000, "images_per_prompt": 10_000},
        train={"updates_per_step": 1, "micro_batch": 2**62 - 1},
    )
    started = time.process_time()
    with pytest.raises(RecipeError, match="Nearest that do: 3000000000 or 6000000000"):
        geometry(recipe, rank=0, world=1)
    assert time.process_time() - started < 1


@given(st.integers(1, 3000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]

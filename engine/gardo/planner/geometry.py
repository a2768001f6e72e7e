"""Batch geometry of a recipe: what each rank samples, and how an update becomes micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError


@dataclass(frozen=True)
class Geometry:
    """Per rank and iteration."""

    samples: int  # images sampled by this rank
    first: int  # index of the first of them in the step
    sampled: int  # images of a sampling forward
    fill: bool  # short calls of sampling and teachers are filled up to as many rows
    rows: int  # training rows of an update
    micro_batch: int  # rows of a forward and backward
    accumulation: int  # micro-batches of an update

    @property
    def sampled_rows(self) -> int:
        """Images that go through the model at each denoise step, those that fill up included."""
        calls = -(-self.samples // self.sampled)
        return calls * self.sampled if self.fill else self.samples


def geometry(recipe: Recipe, *, rank: int, world: int, source: str = "recipe") -> Geometry:
    """How the recipe splits over `world` ranks. RecipeError says which numbers would."""
    data, updates = recipe.data, recipe.train.updates_per_step
    prompts, images = data.prompts_per_step, data.images_per_prompt
    if prompts * images % (world * updates):
        near = _multiples_near(prompts, of=world * updates // math.gcd(world * updates, images))
        raise RecipeError(
            f"{source}: data.prompts_per_step: {prompts} prompts x {images} images = "
            f"{prompts * images} do not split evenly over {world} ranks with {updates} updates a "
            f"step. Nearest that do: prompts_per_step {' or '.join(map(str, near))}."
        )
    samples = prompts * images // world
    steps = recipe.rows_per_sample
    rows = samples // updates * steps
    micro_batch = recipe.train.micro_batch or rows
    if rows % micro_batch:
        near = sorted(sorted(divisors(rows), key=lambda m: abs(m - micro_batch))[:2])
        raise RecipeError(
            f"{source}: train.micro_batch: {micro_batch} does not divide the {rows} rows "
            f"({samples // updates} samples x {steps} steps) of an update on each of "
            f"{world} ranks. Nearest that do: {' or '.join(map(str, near))}."
        )
    batch = recipe.rollout.batch
    return Geometry(
        samples=samples,
        first=rank * samples,
        sampled=micro_batch if batch == "like_train" else min(samples, batch or micro_batch),
        fill=batch == "like_train" or recipe.train.compile != "none",
        rows=rows,
        micro_batch=micro_batch,
        accumulation=rows // micro_batch,
    )


def _multiples_near(number: int, *, of: int) -> list[int]:
    """The two positive multiples that are nearest to a number which is none."""
    below = max(of, number // of * of)
    return [below, below + of]


def divisors(number: int) -> list[int]:
    """Of a positive number, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})

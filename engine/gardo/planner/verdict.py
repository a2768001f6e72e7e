"""Whether a recipe fits the GPUs that are here: what `gardo train` says before anything loads."""

from __future__ import annotations

from gardo.planner.advice import advise
from gardo.planner.geometry import geometry
from gardo.planner.memory import Counted
from gardo.planner.page import advice_line, verdict_line
from gardo.planner.shadow import Shadow
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError


def verdict(recipe: Recipe, *, world: int, room: int, source: str = "recipe") -> str:
    """A line with the peak. RecipeError, with what would make it fit, where `room` bytes of each
    GPU are not enough."""
    plan = geometry(recipe, rank=0, world=world, source=source)
    counted = Counted(Shadow(recipe))
    settled = counted.settled(recipe, plan, world, room)
    memory = counted.memory(settled, plan, world)
    line = verdict_line(memory, room, settled)
    if memory.peak <= room:
        return line
    advice = advice_line(recipe, advise(counted, recipe, world, room))
    raise RecipeError(
        f"{source}: {line}\n{advice}\n`gardo plan` says more; --ignore-plan trains all the same"
    )

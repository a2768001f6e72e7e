"""What gathering the weights once will take of a run that is about to start, by its plan."""

from __future__ import annotations

import torch

from gardo.distributed.gather import Forecast
from gardo.planner.geometry import geometry
from gardo.planner.memory import Counted
from gardo.planner.shadow import Shadow
from gardo.recipe import Recipe


def forecast(recipe: Recipe, world: int, device: torch.device) -> Forecast:
    """For a rank whose engine has started and has no slots yet.

    Nothing for the host's memory and for the built-in models, which no plan is made for.
    """
    if device.type != "cuda":
        return Forecast(0, f"no plan on a {device.type}")
    if recipe.model.path.startswith("builtin:"):
        return Forecast(0, "no plan of a built-in model")
    try:
        counted = Counted(Shadow(recipe))
        phase = counted.forecast(recipe, geometry(recipe, rank=0, world=world), world)
    except Exception as error:  # a model of one's own may do what no plan foresees
        return Forecast(0, f"no plan: {type(error).__name__}: {error}")
    return Forecast(phase.bytes, f"phase {phase.name}")

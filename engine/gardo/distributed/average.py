"""An exponential moving average of the weights that train, kept in a slot of its own.

After the n-th optimizer step, where n is a multiple of `every`,

    average := d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n)),

which forgets the start faster while n is small. Values and warm-up are Flow-GRPO's
(yifan123/flow_grpo, ema.py: decay 0.9 every 8 steps). It starts as the weights of the start.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gardo.distributed.slots import Slots
from gardo.settings import Strict

AVERAGE = "average"  # the slot


class AverageSettings(Strict):
    """An average of what trains, over about `every` / (1 - `decay`) optimizer steps."""

    decay: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="the largest d; after n steps it is min(decay, (1 + n) / (10 + n))",
    )
    every: int = Field(8, ge=1, description="optimizer steps from one update to the next")
    evaluate: bool = Field(True, description="evaluations draw with the average")


class Average:
    """What moves the slot."""

    def __init__(self, settings: AverageSettings) -> None:
        self.settings = settings
        self.updates = 0  # optimizer steps so far

    def after_update(self, slots: Slots) -> None:
        self.updates += 1
        n = self.updates
        if n % self.settings.every == 0:
            slots.decay(AVERAGE, min(self.settings.decay, (1 + n) / (10 + n)))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]

"""What DiffusionNFT and AWM share: images of a deterministic sampler, noised afresh to train.

Nothing of the sampling is recorded; each image trains at some of the sampler's times.
"""

from __future__ import annotations

from typing import Any, ClassVar

from gardo.algorithms.advantage import group_credit
from gardo.algorithms.base import Algorithm, Needs, SlotMoves, World
from gardo.types import Credit, SamplePlan, Scores


class ForwardProcess(Algorithm):
    """Counts gradient steps as `updates`: weights of the past follow by them."""

    sampling_weights: ClassVar[str] = "train"

    def __init__(self, settings: Any, world: World, solver: str) -> None:
        super().__init__(settings, world)
        self.table = world.transitions(solver)
        self.updates = 0

    @classmethod
    def needs(cls, settings: Any) -> Needs:
        return Needs(images_per_prompt=2)  # it compares them

    def plan(self, step: int) -> SamplePlan:
        return SamplePlan(
            transitions=self.table,
            record=(),
            weights=self.sampling_weights,
            same_initial_noise=self.world.sampler.same_initial_noise,
        )

    def credit(self, scores: Scores) -> Credit:
        return group_credit(scores, self.settings.advantage, gate=self.has_kl)

    def after_update(self, slots: SlotMoves) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: Any) -> None:
        self.updates = int(state["updates"])

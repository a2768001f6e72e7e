"""ReFL (ImageReward, arXiv 2304.05977) for flow models.

The gradient of a differentiable reward at a random late step. The sampler runs without gradients;
at one late step, the same on all ranks, the predicted image x0 = x - sigma v is decoded with
gradients, scored, and loss = weight mean(relu(margin - R)) with R = (reward - mean) / std.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

import gardo_kernels
from gardo.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    Context,
    Needs,
    SamplerSettings,
    World,
)
from gardo.rollout import noise_id, recorded_points
from gardo.streams import Stream
from gardo.types import Batch, Credit, Metrics, Points, Rollout, SamplePlan, Scores

if TYPE_CHECKING:
    from torch import Tensor


class ReFLSettings(AlgorithmSettings):
    name: Literal["refl"] = "refl"
    late: float = Field(
        0.25, gt=0, le=1, description="share of the steps, from the end, that may be trained"
    )
    weight: float = Field(1e-3, gt=0, description="of the loss")
    margin: float = Field(2.0, description="rewards above it have no gradient")
    reward_mean: float = Field(
        0.1671736,
        description="taken from the reward; ImageReward's by default",
    )
    reward_std: float = Field(
        1.0333395,
        gt=0,
        description="the reward is divided by it; ImageReward's by default",
    )


class ReFL(Algorithm):
    Settings = ReFLSettings

    def __init__(self, settings: ReFLSettings, world: World) -> None:
        super().__init__(settings, world)
        self.table = world.transitions("ode")

    @classmethod
    def needs(cls, settings: ReFLSettings) -> Needs:
        return Needs(differentiable=True)

    @classmethod
    def rows_per_sample(cls, settings: ReFLSettings, sampler: SamplerSettings) -> int:
        return 1

    def plan(self, step: int) -> SamplePlan:
        steps = self.table.steps
        late = max(1, round(self.settings.late * steps))
        draw = gardo_kernels.random_uniform(
            self.world.seed, noise_id(step, torch.zeros(1, dtype=torch.int64)), Stream.LATE, 1
        )
        return SamplePlan(
            transitions=self.table,
            record=(steps - 1 - int(float(draw) * late),),
            same_initial_noise=self.world.sampler.same_initial_noise,
        )

    def credit(self, scores: Scores) -> Credit:
        """None: the gradient comes from the reward itself."""
        return Credit(
            advantage_B=torch.zeros_like(scores.proxy_B), gate_B=torch.zeros_like(scores.valid_B)
        )

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        return recorded_points(rollout)

    def loss(self, ctx: Context, batch: Batch) -> tuple[Tensor, Metrics]:
        points, settings = batch.points, self.settings
        sigma_R = points.extra["sigma"].view(-1, *[1] * (points.x_RX.dim() - 1))
        x0_RX = points.x_RX - sigma_R * ctx.velocity(batch)
        reward_R = ctx.score(ctx.decode(x0_RX), batch)
        standard_R = (reward_R - settings.reward_mean) / settings.reward_std
        loss = settings.weight * torch.relu(settings.margin - standard_R).mean()
        metrics = Metrics().mean("loss", loss.expand(1)).mean("reward_x0", reward_R)
        return loss, metrics


PLUGIN = ReFL

"""DanceGRPO (arXiv 2505.07818): every step but the last is an SDE's, some of them are trained.

The last step is deterministic, so that the image is the last step's predicted x0, which is what the
reward sees. Each sample trains `sampler.train_steps` of the T - 1 stochastic steps, drawn from
(seed, iteration, sample). Its usual sampler is `sde: dance` with eta 0.3 over a linear schedule
that is shifted by 3, T = 16, 9 steps trained, and one initial noise for a group.

Shapes: B samples of this rank, T - 1 recorded steps, K trained ones, R = B K rows.
"""

from __future__ import annotations

from typing import Literal

import torch

import gardo_kernels
from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.flow_grpo import ClippedSettings, FlowGRPO
from gardo.flow import Transitions
from gardo.rollout import noise_id
from gardo.streams import Stream
from gardo.types import Credit, Points, Rollout, select


class DanceGRPOSettings(ClippedSettings):
    name: Literal["dance_grpo"] = "dance_grpo"
    advantage: AdvantageSettings = AdvantageSettings(std="group_unbiased")


class DanceGRPO(FlowGRPO):
    Settings = DanceGRPOSettings

    def recorded(self, step: int) -> range:
        return range(self.world.sampler.steps - 1)

    def transitions(self, step: int) -> Transitions:
        sampler = self.world.sampler
        return self.world.transitions([sampler.sde] * (sampler.steps - 1) + ["ode"])

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        """The steps that were drawn, of those recorded: no step twice in a sample."""
        recorded, count = len(rollout.step_T), self.world.sampler.train_steps
        identity_B = noise_id(rollout.step, rollout.sample_B)
        draw_BT = gardo_kernels.random_uniform(rollout.seed, identity_B, Stream.TIMES, recorded)
        chosen_BK = draw_BT.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
        first_B = recorded * torch.arange(len(identity_B))
        return select(super().points(rollout, credit), (first_B[:, None] + chosen_BK).flatten())


PLUGIN = DanceGRPO

"""Flow-GRPO-Fast: only a window of steps is stochastic and trained, the others are an ODE's.

The window holds `sampler.train_steps` = w of the T steps. Each iteration it starts anew, uniformly
at one of 0 .. T // 2 - w, drawn from (seed, iteration): the same on every rank and after a resume.
(The release draws on each rank.) Its usual sampler is CPS with noise level 0.8 and w = 3.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

import gardo_kernels
from gardo.algorithms.base import SamplerSettings
from gardo.algorithms.flow_grpo import ClippedSettings, FlowGRPO
from gardo.flow import Transitions
from gardo.rollout import noise_id
from gardo.streams import Stream


def drawn_start(seed: int, step: int, starts: int) -> int:
    """One of 0 .. starts - 1, a function of the run's seed and the iteration."""
    identity = noise_id(step, torch.zeros(1, dtype=torch.int64))
    return int(float(gardo_kernels.random_uniform(seed, identity, Stream.WINDOW, 1)) * starts)


class FlowGRPOFastSettings(ClippedSettings):
    name: Literal["flow_grpo_fast"] = "flow_grpo_fast"
    clip_range: float = Field(1e-5, gt=0, lt=1)


class FlowGRPOFast(FlowGRPO):
    Settings = FlowGRPOFastSettings

    @classmethod
    def check(cls, settings: Any, sampler: SamplerSettings) -> None:
        super().check(settings, sampler)
        half = sampler.steps // 2
        if sampler.train_steps > half:
            raise ValueError(
                f"sampler.train_steps: a window of {sampler.train_steps} does not fit into the "
                f"first half of {sampler.steps} steps; at most {half}, or more sampler.steps"
            )

    def recorded(self, step: int) -> range:
        """The window."""
        width = self.world.sampler.train_steps
        start = drawn_start(self.world.seed, step, self.world.sampler.steps // 2 - width + 1)
        return range(start, start + width)

    def transitions(self, step: int) -> Transitions:
        window, sampler = self.recorded(step), self.world.sampler
        return self.world.transitions(
            [sampler.sde if t in window else "ode" for t in range(sampler.steps)]
        )


PLUGIN = FlowGRPOFast

"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO with a normalised ratio.

Flow-GRPO's ratio is below 1 on average, by the step's squared shift of the mean, and its spread
depends on the step's noise. GRPO-Guard takes ratio = exp(mean(z (mu - mu_old))) instead, with the
means mu = A x + B v of the step x' = mu_old + std z: no square, and the same scale in every step.
The policy term is divided by -dt, so that the steps weigh alike.

In the terms of `policy_loss`: h = 1 / (2 std), no quadratic part, weight -1 / dt. CPS is left out:
its log-probability has no std to normalise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from gardo.algorithms.base import SamplerSettings
from gardo.algorithms.flow_grpo import ClippedSettings, FlowGRPO
from gardo.flow import SDES, VARIANTS
from gardo.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


class GRPOGuardSettings(ClippedSettings):
    name: Literal["grpo_guard"] = "grpo_guard"
    clip_range: float = Field(2e-6, gt=0, lt=1)


class GRPOGuard(FlowGRPO):
    Settings = GRPOGuardSettings

    @classmethod
    def check(cls, settings: Any, sampler: SamplerSettings) -> None:
        super().check(settings, sampler)
        if not VARIANTS[sampler.sde].gaussian:
            others = " or ".join(name for name in SDES if VARIANTS[name].gaussian)
            raise ValueError(
                f"sampler.sde: {sampler.sde} has no ratio that grpo_guard could normalise; use "
                f"{others}"
            )

    def ratio_terms(self, batch: Batch, velocity_RX: Tensor) -> dict[str, Any]:
        extra = batch.points.extra
        return {
            **super().ratio_terms(batch, velocity_RX),
            "h": 0.5 / extra["std"],
            "weight": -1 / extra["dt"],
            "quadratic": False,
        }


PLUGIN = GRPOGuard

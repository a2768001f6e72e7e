"""DDPO's plain policy gradient (arXiv 2305.13301): loss = -mean(A log p(x' | x)), never clipped.

The recorded steps of an SDE sampler are scored under the policy as it is now; there is no ratio to
the policy that sampled them, so several updates an iteration use samples that are a little old.

In the terms of `policy_loss`: the old velocity is the present one, and u what is then left of the
step, w - v with w = v_rollout + u. The ratio is 1, and its gradient that of log p.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.flow_grpo import FlowGRPO, PolicyGradientSettings
from gardo.contract import NoRatio
from gardo.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


class DDPOSettings(PolicyGradientSettings):
    name: Literal["ddpo"] = "ddpo"
    advantage: AdvantageSettings = AdvantageSettings(std="group")


class DDPO(FlowGRPO):
    Settings = DDPOSettings

    @classmethod
    def contract_of(cls, settings: DDPOSettings) -> NoRatio:
        return NoRatio()

    def ratio_terms(self, batch: Batch, velocity_RX: Tensor) -> dict[str, Any]:
        points, now = batch.points, velocity_RX.detach()
        residual = points.velocities["rollout"].float() - now.float() + points.extra["u"]
        return {"v_old": now, "u": residual, "h": points.extra["h"]}


PLUGIN = DDPO

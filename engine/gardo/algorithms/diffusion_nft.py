"""DiffusionNFT (arXiv 2509.16117): images are noised afresh, and a contrast is regressed.

The contrast is of an implicit good and an implicit bad policy. Samples come from the `old` weights
with an ODE; each image trains at some of the sampler's own times, each with its own noise.
With r = clamp(clamp(A) / 10 + 1/2, 0, 1) the loss pulls v towards good images and away from bad
ones around v_old. After each iteration old <- d old + (1 - d) train. The KL to the reference is a
velocity error.

Shapes: B samples of this rank, K trained times a sample, R = B K rows, X one latent.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gardo.algorithms.advantage import AdvantageSettings, group_credit
from gardo.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    Context,
    SamplerSettings,
    SlotMoves,
    World,
)
from gardo.rollout import FRESH, TIMES, noise_id
from gardo.settings import Strict
from gardo.types import Batch, Credit, Metrics, Points, Rollout, SamplePlan, Scores
from gardo_kernels import nft_loss, nft_preference, random_normal, random_uniform


class DecaySettings(Strict):
    """How slowly `old` follows after n gradient steps: min(slope max(n - start, 0), limit)."""

    slope: float = Field(0.001, ge=0)
    start: int = Field(0, ge=0)
    limit: float = Field(0.5, ge=0, lt=1)

    def rate(self, n: int) -> float:
        return min(self.slope * max(n - self.start, 0), self.limit)


class DiffusionNFTSettings(AlgorithmSettings):
    name: Literal["diffusion_nft"] = "diffusion_nft"
    guidance_strength: float = Field(1.0, gt=0, le=1, description="b: 1 (GenEval) or 0.1 (OCR)")
    beta: float = Field(1e-4, ge=0, description="weight of the velocity error to the reference")
    solver: Literal["ode", "dpm2"] = "dpm2"
    advantage: AdvantageSettings = AdvantageSettings()
    advantage_clip: float = Field(5.0, gt=0)
    decay: DecaySettings = DecaySettings()


class DiffusionNFT(Algorithm):
    Settings = DiffusionNFTSettings

    def __init__(self, settings: DiffusionNFTSettings, world: World) -> None:
        super().__init__(settings, world)
        self.table = world.transitions(settings.solver)
        self.updates = 0

    @classmethod
    def slots_of(cls, settings: DiffusionNFTSettings) -> tuple[str, ...]:
        return ("old", "reference") if settings.beta else ("old",)

    @classmethod
    def check(cls, settings: DiffusionNFTSettings, sampler: SamplerSettings) -> None:
        if sampler.train_steps > sampler.steps:
            raise ValueError(
                f"sampler.train_steps: {sampler.train_steps} times of {sampler.steps} steps; "
                f"at most {sampler.steps}"
            )

    @property
    def has_kl(self) -> bool:
        return self.settings.beta > 0

    def plan(self, step: int) -> SamplePlan:
        return SamplePlan(
            transitions=self.table,
            record=(),
            weights="old",
            same_initial_noise=self.world.sampler.same_initial_noise,
        )

    def credit(self, scores: Scores) -> Credit:
        return group_credit(scores, self.settings.advantage, gate=self.has_kl)

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        """Each image at `train_steps` of the sampler's times, no time twice, with fresh noise."""
        count, device = self.world.sampler.train_steps, rollout.final_BX.device
        identity_B = noise_id(rollout.step, rollout.sample_B)
        seed, kernels = rollout.seed, self.world.kernels
        order = random_uniform(seed, identity_B, TIMES, self.table.steps, backend=kernels)
        step_BK = order.argsort(dim=1, stable=True)[:, :count]
        shape = rollout.final_BX.shape[1:]
        noise_BKX = torch.stack(
            [
                random_normal(seed, identity_B, FRESH + k, shape, backend=kernels)
                for k in range(count)
            ],
            1,
        )
        step_R = step_BK.flatten()
        sample_R = torch.arange(len(identity_B), device=device).repeat_interleave(count)
        sigma_R = rollout.transitions.rows(step_R, "sigma")
        x0_RX = rollout.final_BX[sample_R]
        share = sigma_R.view(-1, *[1] * (x0_RX.dim() - 1))
        return Points(
            sample_R=sample_R,
            prompt_R=rollout.prompt_B[sample_R],
            step_R=step_R,
            sigma_R=sigma_R,
            x_RX=(1 - share) * x0_RX + share * noise_BKX.flatten(0, 1),
            extra={"x0": x0_RX},
        )

    def teachers(self, points: Points, credit: Credit) -> dict[str, Tensor]:
        wanted = {"old": torch.ones_like(points.sample_R, dtype=torch.bool)}
        if self.has_kl:
            wanted["reference"] = credit.gate_B[points.sample_R]
        return wanted

    def loss(self, ctx: Context, batch: Batch) -> tuple[Tensor, Metrics]:
        points, settings = batch.points, self.settings
        out = nft_loss(
            ctx.velocity(batch),
            points.velocities["old"],
            points.x_RX,
            points.extra["x0"],
            points.sigma_R,
            r=nft_preference(batch.advantage_R, settings.advantage_clip),
            b=settings.guidance_strength,
            gate=batch.gate_R if self.has_kl else None,
            v_ref=points.velocities["reference"] if self.has_kl else None,
            beta=settings.beta,
            policy_scale=settings.advantage_clip,
            backend=self.world.kernels,
        )
        metrics = Metrics().mean("loss", out.loss.expand(1)).mean("policy_loss", out.policy_R)
        if self.has_kl:
            gate_R = batch.gate_R.float()
            metrics.mean("kl", out.kl_R, gate_R).mean("gate_share", gate_R)
        return out.loss, metrics

    def after_update(self, slots: SlotMoves) -> None:
        self.updates += 1

    def after_step(self, slots: SlotMoves, metrics: Metrics) -> list[str]:
        slots.decay("old", self.settings.decay.rate(self.updates))
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state) -> None:  # type: ignore[no-untyped-def]
        self.updates = int(state["updates"])


PLUGIN = DiffusionNFT

"""DiffusionNFT (arXiv 2509.16117): images are noised afresh, and a contrast is regressed.

The contrast is of an implicit good and an implicit bad policy. Samples come from the `old` weights
with an ODE; each image trains at some of the sampler's own times, each with its own noise.
With r = clamp(clamp(A) / 10 + 1/2, 0, 1) the loss pulls v towards good images and away from bad
ones around v_old. After each iteration old <- d old + (1 - d) train. The KL to the reference is a
velocity error.

Two decays were released, d after n gradient steps: min(.001 n, .5) (`decay` left out), and 0 until
75, then min(.0075 (n - 75), .999) (`decay: {slope: 0.0075, start: 75, limit: 0.999}`). NFT trains
at 9 of 10 times (`sampler.train_steps: 9`), GARDO around it at all 10.

Shapes: B samples of this rank, K trained times a sample, R = B K rows, X one latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

import gardo_kernels
from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.base import Context, DecaySettings, SamplerSettings, SlotMoves, World
from gardo.algorithms.forward_process import ForwardProcess
from gardo.algorithms.kl import KLSettings, asks_reference, gated_share, note_kl
from gardo.rollout import fresh_points, noise_id
from gardo.streams import Stream
from gardo.types import Batch, Credit, Metrics, Points, Rollout

if TYPE_CHECKING:
    from torch import Tensor


class DiffusionNFTSettings(KLSettings):
    name: Literal["diffusion_nft"] = "diffusion_nft"
    guidance_strength: float = Field(1.0, gt=0, le=1, description="b: 1 (GenEval) or 0.1 (OCR)")
    beta: float = Field(1e-4, ge=0, description="weight of the velocity error to the reference")
    solver: Literal["ode", "dpm2"] = Field(
        "dpm2",
        description="what samples: Euler, or DPM-Solver++ of second order",
    )
    advantage: AdvantageSettings = Field(
        AdvantageSettings(),
        description="how rewards become advantages",
    )
    advantage_clip: float = Field(
        5.0,
        gt=0,
        description="advantages are clamped to +- this; at its ends an image is wholly good or bad",
    )
    decay: DecaySettings = Field(
        DecaySettings(),
        description="how slowly the old weights, which sample, follow",
    )

    def kl_weights(self, gated: int, samples: int) -> tuple[float, float]:
        """With `released`, ungated rows too: those of a micro-batch without a gated one count."""
        of_gated, _ = super().kl_weights(gated, samples)
        others = samples - gated
        if self.kl_reduction != "released" or not others:
            return of_gated, 0.0
        share = gated_share(gated, samples, self.kl_micro_batch)
        return of_gated, samples * (1.0 - share) / others


class DiffusionNFT(ForwardProcess):
    Settings = DiffusionNFTSettings
    sampling_weights = "old"

    def __init__(self, settings: DiffusionNFTSettings, world: World) -> None:
        super().__init__(settings, world, settings.solver)

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

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        """Each image at `train_steps` of the sampler's times, no time twice, with fresh noise."""
        identity_B = noise_id(rollout.step, rollout.sample_B)
        order = gardo_kernels.random_uniform(
            rollout.seed, identity_B, Stream.TIMES, self.table.steps
        )
        step_BK = order.argsort(dim=1, stable=True)[:, : self.world.sampler.train_steps]
        points, x0_RX, _ = fresh_points(rollout, step_BK, kernels=self.world.kernels)
        return points.with_extra(x0=x0_RX)

    def teachers(self, points: Points, credit: Credit) -> dict[str, Tensor]:
        everywhere = torch.ones_like(points.sample_R, dtype=torch.bool)
        if not self.has_kl:
            return {"old": everywhere}
        return {"old": everywhere, "reference": asks_reference(points, credit)}

    def loss(self, ctx: Context, batch: Batch) -> tuple[Tensor, Metrics]:
        points, settings = batch.points, self.settings
        out = gardo_kernels.nft_loss(
            ctx.velocity(batch),
            points.velocities["old"],
            points.x_RX,
            points.extra["x0"],
            points.sigma_R,
            advantage=batch.advantage_R,
            b=settings.guidance_strength,
            gate=batch.kl_weight_R if self.has_kl else None,
            v_ref=points.velocities["reference"] if self.has_kl else None,
            beta=settings.beta,
            adv_clip=settings.advantage_clip,
            policy_scale=settings.advantage_clip,
            backend=self.world.kernels,
        )
        metrics = Metrics().mean("loss", out.loss.expand(1)).mean("policy_loss", out.policy_R)
        if self.has_kl:
            note_kl(metrics, out.kl_R, batch)
        return out.loss, metrics

    def after_step(self, slots: SlotMoves, metrics: Metrics) -> list[str]:
        slots.decay("old", self.settings.decay.rate(self.updates))
        return []


PLUGIN = DiffusionNFT

"""Advantage Weighted Matching (AWM, arXiv 2509.25050): policy gradient on the flow-matching loss.

Images come from an ODE with the trained weights. Each trains at some of the sampler's times with
fresh noise, the same for the trained and the old velocity; the flow-matching error, transformed, is
the log-probability of a clipped ratio, with target = noise - x0. A KL in velocity to the reference
(gated, if GARDO wraps this) and one to an `ema` of the weights hold it.

In an iteration's first update the old velocity is the trained one, detached: the ratio is 1, its
gradient the policy gradient, and no teacher runs. Later updates compare with the `train` weights of
before training: one forward a row more for their samples (`old_velocity: current` leaves it out).
The EMA follows after each gradient step; its velocities are those of the iteration's start.

Shapes: B samples of this rank, K trained times a sample, R = B K rows, X one latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator

import gardo_kernels
from gardo.algorithms.advantage import AdvantageSettings, with_credit, without_credit
from gardo.algorithms.base import Context, DecaySettings, SamplerSettings, SlotMoves, World
from gardo.algorithms.forward_process import ForwardProcess
from gardo.algorithms.kl import KLSettings, asks_reference, note_kl
from gardo.rollout import fresh_points, noise_id, update_of
from gardo.settings import Pair
from gardo.streams import Stream
from gardo.types import Batch, Credit, Metrics, Points, Rollout

if TYPE_CHECKING:
    from torch import Tensor


class AWMSettings(KLSettings):
    name: Literal["awm"] = "awm"
    transform: Literal["uniform", "t", "t2", "huber", "ghuber"] = Field(
        "ghuber", description="of the flow-matching error into a log-probability"
    )
    power: float = Field(0.25, gt=0, description="of ghuber")
    times: Pair[int] | None = Field(
        None, description="first and last step that are trained; [1, steps - 3] if left out"
    )
    clip_range: float = Field(1.0, gt=0, description="the ratio is clipped to 1 +- this")
    beta: float = Field(3e-3, ge=0, description="weight of the velocity error to the reference")
    ema_beta: float = Field(1.0, ge=0, description="weight of the velocity error to the EMA")
    ema_decay: DecaySettings = Field(
        DecaySettings(slope=0.001, limit=0.3),
        description="how slowly the EMA follows",
    )
    advantage: AdvantageSettings = Field(
        AdvantageSettings(),
        description="how rewards become advantages",
    )
    advantage_clip: float = Field(
        5.0, gt=0, description="advantages are clamped to it and divided by it"
    )
    old_velocity: Literal["auto", "current"] = Field(
        "auto", description="after the first update: the weights of before training, or detached"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.times and not 0 <= self.times[0] <= self.times[1]:
            raise ValueError(f"times {list(self.times)} must satisfy 0 <= first <= last")
        return self

    def trained(self, steps: int) -> tuple[int, int]:
        """The first and the last step that may be trained."""
        return self.times or (1, steps - 3)


def stratified_steps(draw_BK: Tensor, first: int, last: int) -> Tensor:
    """int64 [B, K]: one of first .. last in each of K equal bins, from uniforms in [0, 1).

    The bins are cut at whole steps, so no step falls into two.
    """
    K = draw_BK.shape[1]
    edges = [first + k * (last + 1 - first) // K for k in range(K + 1)]
    low_K = torch.tensor(edges[:-1])
    width_K = torch.tensor(edges[1:]) - low_K
    within_BK = (draw_BK * width_K).long()  # fp32 may round up to the width
    return low_K + torch.minimum(within_BK, width_K - 1)


class AWM(ForwardProcess):
    Settings = AWMSettings

    def __init__(self, settings: AWMSettings, world: World) -> None:
        super().__init__(settings, world, "ode")

    @classmethod
    def slots_of(cls, settings: AWMSettings) -> tuple[str, ...]:
        wanted = {"reference": settings.beta, "ema": settings.ema_beta}
        return tuple(name for name, weight in wanted.items() if weight)

    @classmethod
    def check(cls, settings: AWMSettings, sampler: SamplerSettings) -> None:
        first, last = settings.trained(sampler.steps)
        if not first <= last < sampler.steps:
            raise ValueError(
                f"sampler.steps: {sampler.steps} steps have no times {first} to {last} to train; "
                f"use at least {max(last + 1, 4)}, or other `times` of the algorithm"
            )
        if sampler.train_steps > last + 1 - first:
            raise ValueError(
                f"sampler.train_steps: {sampler.train_steps} of the times {first} to {last}; at "
                f"most {last + 1 - first}"
            )

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        world, identity_B = self.world, noise_id(rollout.step, rollout.sample_B)
        K = world.sampler.train_steps
        draw_BK = gardo_kernels.random_uniform(rollout.seed, identity_B, Stream.TIMES, K)
        step_BK = stratified_steps(draw_BK, *self.settings.trained(self.table.steps))
        points, x0_RX, noise_RX = fresh_points(rollout, step_BK, kernels=world.kernels)
        update_B = update_of(rollout.sample_B, world.updates, seed=rollout.seed, step=rollout.step)
        detached_B = (update_B == 0) | (self.settings.old_velocity == "current")
        return points.with_extra(target=noise_RX - x0_RX, detached=detached_B[points.sample_R])

    def teachers(self, points: Points, credit: Credit) -> dict[str, Tensor]:
        wanted = {}
        if self.settings.ema_beta:
            wanted["ema"] = torch.ones_like(points.sample_R, dtype=torch.bool)
        if self.world.updates > 1 and self.settings.old_velocity == "auto":
            wanted["train"] = ~points.extra["detached"]
        if self.has_kl:
            wanted["reference"] = asks_reference(points, credit)
        return wanted

    def weightless(self, points: Points, credit: Credit) -> Tensor | None:
        return None if self.settings.ema_beta else without_credit(points, credit)

    def loss(self, ctx: Context, batch: Batch) -> tuple[Tensor, Metrics]:
        points, settings = batch.points, self.settings
        velocity_RX = ctx.velocity(batch)
        old_RX = velocity_RX.detach()
        if "train" in points.velocities:
            detached = points.extra["detached"].view(-1, *[1] * (old_RX.dim() - 1))
            old_RX = torch.where(detached, old_RX, points.velocities["train"].to(old_RX.dtype))
        clip = settings.advantage_clip
        out = gardo_kernels.awm_loss(
            velocity_RX,
            old_RX,
            points.extra["target"],
            advantage=batch.advantage_R.clamp(-clip, clip) / clip,
            t=points.sigma_R,
            transform=settings.transform,
            power=settings.power,
            gate=batch.kl_weight_R if self.has_kl else None,
            v_ref=points.velocities["reference"] if self.has_kl else None,
            beta=settings.beta,
            v_ema=points.velocities.get("ema"),
            ema_beta=settings.ema_beta,
            clip_low=settings.clip_range,
            clip_high=settings.clip_range,
            backend=self.world.kernels,
        )
        metrics = Metrics()
        for name, values in (
            ("loss", out.loss.expand(1)),
            ("policy_loss", out.loss_R),
            ("clip_fraction", (out.clipped_high_R | out.clipped_low_R).float()),
        ):
            metrics.mean(name, values, share=batch.share)
        metrics.mean("ratio", out.ratio_R, with_credit(batch))
        if settings.ema_beta:
            metrics.mean("ema_kl", out.ema_R)
        if self.has_kl:
            note_kl(metrics, out.kl_R, batch)
        return out.loss, metrics

    def after_update(self, slots: SlotMoves) -> None:
        super().after_update(slots)
        if self.settings.ema_beta:
            slots.decay("ema", self.settings.ema_decay.rate(self.updates))


PLUGIN = AWM

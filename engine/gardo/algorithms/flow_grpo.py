"""Flow-GRPO (arXiv 2505.05470): clipped policy gradient over the recorded steps of an SDE sampler.

The family's other members change two things, each a method: which steps are stochastic and
recorded (`transitions`, `recorded`), and what the ratio is made of (`ratio_terms`).

With a KL to a reference. Without `beta` there is no reference at all. With it the KL acts on every
sample (DPOK-like, to the initial policy), unless GARDO wraps this and gates it. While the reference
equals the sampling policy (at the start, and in the iteration after a reset), the rollout's own
velocities are the reference's: no teacher runs.

`kl_in_reward` is another KL: that of the sampled trajectory to the reference, taken from the proxy
before advantages, without a gradient of its own. It needs the reference's velocities at all
recorded steps before credit; the KL in the loss, if there is one, uses the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

import gardo_kernels
from gardo.algorithms.advantage import AdvantageSettings, group_credit, with_credit, without_credit
from gardo.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    Context,
    Needs,
    SamplerSettings,
    SlotMoves,
    World,
)
from gardo.algorithms.kl import KLSettings, asks_reference, note_kl
from gardo.contract import NoRatio, OldVelocity, RatioContract
from gardo.flow import VARIANTS, Transitions
from gardo.rollout import recorded_points
from gardo.types import Batch, Credit, Metrics, Points, Rollout, SamplePlan, Scores

if TYPE_CHECKING:
    from torch import Tensor

    from gardo_kernels import PolicyLoss


class PolicyGradientSettings(KLSettings):
    """What every policy gradient over recorded steps has."""

    kl: Literal["flow_grpo", "gaussian", "velocity"] = Field(
        "flow_grpo",
        description="the KL of a step, c mean((v - v_ref)^2): c = B^2 / (2 g^2), which beta "
        "0.04 and the resets are calibrated to; B^2 / (2 std^2), the Gaussians' "
        "own; or 1",
    )
    kl_in_reward: float = Field(
        0.0, ge=0, description="weight of the trajectory's KL that is taken from the proxy"
    )
    advantage: AdvantageSettings = Field(
        AdvantageSettings(),
        description="how rewards become advantages",
    )
    advantage_clip: float = Field(5.0, gt=0, description="advantages are clamped to +- this")

    @model_validator(mode="after")
    def _one_reward(self) -> Self:
        if self.kl_in_reward and self.advantage.combine == "advantage":
            raise ValueError(
                "kl_in_reward is taken from the weighted sum of the proxies, which "
                "advantage.combine: advantage does not form; use combine: score, or beta"
            )
        return self


class ClippedSettings(PolicyGradientSettings):
    """With a ratio that is clipped to 1 +- clip_range."""

    clip_range: float = Field(
        1e-4,
        gt=0,
        lt=1,
        description="the ratio is clipped to 1 +- this; small, for a log-probability is a mean "
        "over a latent's elements",
    )
    old_velocity: OldVelocity = Field(
        "auto",
        description="what the ratio compares with: the rollout's velocities, the same "
        "recomputed in the training numerics (one forward a row more), or auto: "
        "recomputed where they differ by half the clip range",
    )


class FlowGRPOSettings(ClippedSettings):
    name: Literal["flow_grpo"] = "flow_grpo"


class FlowGRPO(Algorithm):
    Settings: ClassVar[type[AlgorithmSettings]] = FlowGRPOSettings

    def __init__(self, settings: Any, world: World) -> None:
        super().__init__(settings, world)
        self.contract = self.contract_of(settings)
        self._reference_is_sampler = True

    @classmethod
    def contract_of(cls, settings: Any) -> RatioContract | NoRatio:
        return RatioContract(settings.old_velocity, settings.clip_range)

    @classmethod
    def needs(cls, settings: Any) -> Needs:
        """It compares images. (Where the sampler is the reference, no teacher runs.)"""
        asked = 1.0 if settings.has_kl or settings.kl_in_reward else 0.0
        return Needs(images_per_prompt=2, teachers={"reference": asked})

    @classmethod
    def slots_of(cls, settings: PolicyGradientSettings) -> tuple[str, ...]:
        return ("reference",) if settings.beta or settings.kl_in_reward else ()

    @classmethod
    def check(cls, settings: Any, sampler: SamplerSettings) -> None:
        most = VARIANTS[sampler.sde].most_noise
        if sampler.noise_level > most:
            raise ValueError(
                f"sampler.noise_level: {sampler.noise_level}; sde {sampler.sde} takes a level up "
                f"to {most:g}"
            )
        if sampler.train_steps >= sampler.steps:
            raise ValueError(
                f"sampler.train_steps: {sampler.train_steps} of {sampler.steps} steps; the last "
                f"step of an SDE sampler is not trained: at most {sampler.steps - 1}"
            )

    def transitions(self, step: int) -> Transitions:
        """The sampler of iteration `step`: here every step is stochastic."""
        return self.world.transitions(self.world.sampler.sde)

    def recorded(self, step: int) -> range:
        """The denoise steps that iteration `step` may train, all of them stochastic."""
        return range(self.world.sampler.train_steps)

    def plan(self, step: int) -> SamplePlan:
        table, record = self.transitions(step), tuple(self.recorded(step))
        if not all(table.scored[list(record)]):
            raise ValueError(
                f"{self.settings.name}: steps {list(record)} are recorded, but of "
                f"{table.scored.tolist()} some have no noise, and so no log-probability"
            )
        return SamplePlan(
            transitions=table,
            record=record,
            teachers=self._teachers_before_credit(),
            same_initial_noise=self.world.sampler.same_initial_noise,
        )

    def _teachers_before_credit(self) -> tuple[str, ...]:
        wanted = self.settings.kl_in_reward > 0 and not self._reference_is_sampler
        return ("reference",) if wanted else ()

    def trajectory_kl(self, rollout: Rollout) -> Tensor | None:
        """Sum over the recorded steps of the steps' KLs, fp32 [B].

        The sum, because the KL of two chains is the sum of the KLs of their steps.
        """
        if not self.settings.kl_in_reward:
            return None
        reference_BTX = rollout.velocities.get("reference")
        if reference_BTX is None:  # the sampler is the reference
            return rollout.final_BX.new_zeros(len(rollout.sample_B), dtype=torch.float32)
        difference_BTX = rollout.velocity_BTX.float() - reference_BTX.float()
        scale_T = rollout.transitions.rows(rollout.step_T, f"kl_{self.settings.kl}")
        return (scale_T * difference_BTX.square().flatten(2).mean(2)).sum(1)

    def credit(self, scores: Scores) -> Credit:
        settings, kl_B = self.settings, scores.kl_B
        if kl_B is None:
            return group_credit(scores, settings.advantage, gate=self.has_kl)
        penalised = replace(scores, proxy_B=scores.proxy_B - settings.kl_in_reward * kl_B)
        credit = group_credit(penalised, settings.advantage, gate=self.has_kl)
        return credit.with_info(kl_in_reward=float(kl_B.mean()))

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        points = recorded_points(rollout)
        if self.has_kl:
            scale_R = rollout.transitions.rows(points.step_R, f"kl_{self.settings.kl}")
            points = points.with_extra(kl_scale=scale_R)
        return points

    def teachers(self, points: Points, credit: Credit) -> dict[str, Tensor]:
        if not self.has_kl or self._reference_is_sampler or "reference" in points.velocities:
            return {}
        return {"reference": asks_reference(points, credit)}

    def weightless(self, points: Points, credit: Credit) -> Tensor:
        return without_credit(points, credit)

    def log_ratio(self, batch: Batch, velocity_RX: Tensor) -> Tensor:
        return self._policy_loss(batch, velocity_RX).log_ratio_R

    def loss(self, ctx: Context, batch: Batch) -> tuple[Tensor, Metrics]:
        out = self._policy_loss(batch, ctx.velocity(batch))
        metrics = Metrics()
        for name, values in (
            ("loss", out.loss.expand(1)),
            ("policy_loss", out.loss_R),
            ("clip_fraction", (out.clipped_high_R | out.clipped_low_R).float()),
            ("clip_fraction_high", out.clipped_high_R.float()),
        ):
            metrics.mean(name, values, share=batch.share)
        metrics.mean("ratio", out.ratio_R, with_credit(batch))
        if self.has_kl:
            note_kl(metrics, out.kl_R, batch)
        return out.loss, metrics

    def ratio_terms(self, batch: Batch, velocity_RX: Tensor) -> dict[str, Any]:
        """What the ratio is made of: arguments of `policy_loss`."""
        points, clip = batch.points, self.settings.clip_range
        return {
            "v_old": points.velocities.get("train", points.velocities["rollout"]),
            "u": points.extra["u"],
            "h": points.extra["h"],
            "clip_low": clip,
            "clip_high": clip,
        }

    def _policy_loss(self, batch: Batch, velocity_RX: Tensor) -> PolicyLoss:
        points, settings = batch.points, self.settings
        sampler = points.velocities.get("train", points.velocities["rollout"])
        return gardo_kernels.policy_loss(
            velocity_RX,
            **self.ratio_terms(batch, velocity_RX),
            advantage=batch.advantage_R,
            B=points.extra["B"],
            gate=batch.kl_weight_R if self.has_kl else None,
            v_ref=points.velocities.get("reference", sampler) if self.has_kl else None,
            kl_scale=points.extra.get("kl_scale"),
            beta=settings.beta,
            adv_clip=settings.advantage_clip,
            backend=self.world.kernels,
        )

    def after_step(self, slots: SlotMoves, metrics: Metrics) -> list[str]:
        self._reference_is_sampler = False
        return []

    def reference_reset(self) -> None:
        self._reference_is_sampler = True

    def state_dict(self) -> dict[str, bool]:
        return {"reference_is_sampler": self._reference_is_sampler}

    def load_state_dict(self, state) -> None:  # type: ignore[no-untyped-def]
        self._reference_is_sampler = bool(state["reference_is_sampler"])


PLUGIN = FlowGRPO

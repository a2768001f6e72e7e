"""GARDO (arXiv 2512.24138), around any base algorithm.

Gated and adaptive regularisation with diversity-aware optimisation. What it adds to the base, each
switched off by leaving it out of the recipe:
  gate       eq. 7   the KL acts only on samples whose proxy reward is anomalously high against
                     the auxiliaries
  diversity  eq. 8   positive advantages are scaled by the distance to the group's nearest image
  reference  A.1     the reference is reset to the policy when the KL, or the number of updates,
                     passes a limit

The sign of the gate is the paper's. The released code ranks the other way round: it gates the
samples that the proxy ranks *worse* than the auxiliaries do, a set disjoint from the paper's
(`sign: official_code`). `preset` fills the fields that a recipe leaves out as the paper or the
release has them (gardo_presets.py).

Shapes: B samples of all ranks, D features.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from gardo.algorithms.base import (
    Needs,
    RewardNeed,
    SamplerSettings,
    SlotMoves,
    World,
    plugin_of,
)
from gardo.algorithms.gardo_diversity import METRICS, diversity_factor
from gardo.algorithms.gardo_presets import Preset, filled
from gardo.algorithms.uncertainty import uncertainty
from gardo.algorithms.wrapper import Wrapper, WrapperSettings
from gardo.settings import Pair, Strict
from gardo.types import Credit, Metrics, Scores

if TYPE_CHECKING:
    from torch import Tensor


class GateSettings(Strict):
    """`fraction` of the valid samples is gated.

    It adapts within `limits` to the mean uncertainty, negative values of which count as 0 (`base:
    valid`) or not at all (`base: nonnegative`).
    """

    fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="k: share of the samples whose KL counts, those of the highest U; at first",
    )
    limits: Pair[float] = Field((0.02, 0.2), description="the paper's upper limit is 1")
    warmup: int = Field(20, ge=1, description="iterations before the fraction moves")
    window: int = Field(20, ge=1, description="iterations whose extremes move the fraction")
    sign: Literal["paper", "official_code"] = Field(
        "paper",
        description="paper: the proxy ranks them higher than the auxiliaries do; official_code: "
        "lower",
    )
    population: Literal["batch", "group"] = Field(
        "batch",
        description="among whom win rates and the most uncertain are found: all samples of an "
        "iteration, or those of a prompt",
    )
    base: Literal["valid", "nonnegative"] = Field(
        "valid",
        description="of which samples the fraction, and the mean that moves it, is: all, or those "
        "of U >= 0",
    )
    ties: Literal["equal", "ordered"] = Field(
        "equal", description="equal rewards share their win rate, or the lower sample id wins"
    )
    zero_advantage: bool = Field(True, description="gate samples whose advantage is 0 too")

    @field_validator("limits")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] <= 1:
            raise ValueError(f"{list(value)} must satisfy 0 <= low <= high <= 1")
        return value

    @model_validator(mode="after")
    def _within(self) -> Self:
        low, high = self.limits
        if not low <= self.fraction <= high:
            raise ValueError(f"fraction {self.fraction} is outside limits [{low}, {high}]")
        return self


class DiversitySettings(Strict):
    """`features` names the reward of role features, `metric` how far apart two of them are.

    `normalise: raw` is the paper's text, group_mean its release.
    """

    features: str = Field("dinov3", description="name of the reward of role features")
    metric: Literal["cosine", "euclidean"] = Field(
        "cosine",
        description="d: 1 - cos of two images' features, or their Euclidean distance",
    )
    normalise: Literal["group_mean", "raw"] = Field(
        "group_mean",
        description="a positive advantage is multiplied by d / (the group's mean d), the "
        "release's, or by d, the paper's",
    )


class ReferenceSettings(Strict):
    """Reset when the iteration's KL exceeds `reset_kl`, or after so many steps of either kind.

    Each may be left out. The counts start again at a reset.
    """

    reset_kl: float | None = Field(
        None,
        gt=0,
        description="eps_KL: an iteration's KL above it resets the reference to the policy; "
        "never by the KL if left out",
    )
    statistic: Literal["gated", "loss"] = Field(
        "gated",
        description="the KL that is compared with reset_kl: the mean of the gated rows, or as the "
        "loss has it, without beta: over all rows, ungated ones with their weight, mostly 0",
    )
    reset_updates: int | None = Field(None, ge=1, description="gradient steps")
    reset_iterations: int | None = Field(None, ge=1, description="iterations since the last reset")


class GardoSettings(WrapperSettings):
    name: Literal["gardo"] = "gardo"
    preset: Preset | None = Field(
        None,
        description="fills what is left out, all three mechanisms too: null leaves one of them out",
    )
    gate: GateSettings | None = Field(
        None,
        description="eq. 7: the KL for uncertain samples alone; for all of them if left out",
    )
    diversity: DiversitySettings | None = Field(
        None,
        description="eq. 8: good images unlike their group's others earn more; off if left out",
    )
    reference: ReferenceSettings | None = Field(
        None,
        description="A.1: when the KL's reference is reset to the policy; never if left out",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return filled(value)


def base_of(
    uncertainty_B: Tensor, valid_B: Tensor, base: Literal["valid", "nonnegative"]
) -> Tensor:
    """The samples that a `base` is: all valid ones, or those of U >= 0. bool [B]"""
    return valid_B & (uncertainty_B >= 0) if base == "nonnegative" else valid_B


def most_uncertain(
    uncertainty_B: Tensor,
    valid_B: Tensor,
    sample_B: Tensor,
    fraction: float,
    base: Literal["valid", "nonnegative"] = "valid",
) -> Tensor:
    """bool [B]: exactly round(fraction x number in the base) valid samples of highest U.

    The base is all valid samples, or those of U >= 0. Ties go to the lower sample id.
    """
    count = math.floor(fraction * int(base_of(uncertainty_B, valid_B, base).sum()) + 0.5)
    by_sample = sample_B.argsort(stable=True)
    ranked = torch.where(valid_B, uncertainty_B, -torch.inf)[by_sample]
    order = by_sample[ranked.argsort(descending=True, stable=True)]
    gate_B = torch.zeros_like(valid_B, dtype=torch.bool)
    gate_B[order[:count]] = True
    return gate_B


class Gate:
    """The gated fraction, which follows the mean uncertainty of the last iterations."""

    def __init__(self, settings: GateSettings) -> None:
        self.settings = settings
        self.fraction = settings.fraction
        self.seen: deque[float] = deque(maxlen=settings.window)
        self.iterations = 0

    def select(self, scores: Scores) -> tuple[Tensor, float]:
        """The gate of this iteration and its statistic; moves the fraction for it first."""
        settings = self.settings
        uncertainty_B = uncertainty(scores, settings.population, settings.ties)
        if settings.sign == "official_code":
            uncertainty_B = -uncertainty_B
        seen = uncertainty_B[base_of(uncertainty_B, scores.valid_B, settings.base)]
        statistic = float(seen.clamp(min=0).mean()) if len(seen) else 0.0
        self._adapt(statistic)
        gate_B = most_uncertain(
            uncertainty_B, scores.valid_B, scores.sample_B, self.fraction, settings.base
        )
        return gate_B, statistic

    def _adapt(self, statistic: float) -> None:
        if self.iterations >= self.settings.warmup and self.seen:
            if statistic > max(self.seen):
                self.fraction *= 1.1
            elif statistic < min(self.seen):
                self.fraction *= 0.9
            low, high = self.settings.limits
            self.fraction = min(max(self.fraction, low), high)
        self.seen.append(statistic)
        self.iterations += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "fraction": self.fraction,
            "seen": list(self.seen),
            "iterations": self.iterations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fraction = float(state["fraction"])
        self.seen = deque(state["seen"], maxlen=self.settings.window)
        self.iterations = int(state["iterations"])


class Reference:
    """When to reset the reference to the policy."""

    def __init__(self, settings: ReferenceSettings) -> None:
        self.settings = settings
        self.updates = 0
        self.iterations = 0

    @property
    def metric(self) -> str:
        """What the iteration's KL is called in the metrics."""
        return {"gated": "kl", "loss": "kl_loss"}[self.settings.statistic]

    def why_due(self, kl: float) -> str | None:
        """The reason for a reset after this iteration, if there is one.

        No gated rows, no KL: NaN never triggers.
        """
        settings = self.settings
        if settings.reset_kl is not None and kl > settings.reset_kl:
            return f"kl {kl:.2e} > {settings.reset_kl:.2e}"
        if settings.reset_updates is not None and self.updates >= settings.reset_updates:
            return f"{self.updates} updates"
        if settings.reset_iterations is not None and self.iterations >= settings.reset_iterations:
            return f"{self.iterations} iterations"
        return None

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates, "iterations": self.iterations}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates, self.iterations = int(state["updates"]), int(state["iterations"])


class Gardo(Wrapper):
    """The three mechanisms around the base."""

    Settings = GardoSettings

    def __init__(self, settings: GardoSettings, world: World) -> None:
        super().__init__(settings, world)
        self.gate = Gate(settings.gate) if settings.gate else None
        self.reference = Reference(settings.reference) if settings.reference else None

    @classmethod
    def check(cls, settings: GardoSettings, sampler: SamplerSettings) -> None:
        super().check(settings, sampler)
        base, inner = settings.base, settings.layers()[1:]
        innermost = inner[-1]
        if any(issubclass(plugin_of(layer), Gardo) for layer in inner):
            raise ValueError(
                "algorithm.base: gardo around gardo: one KL would have two gates, one reference "
                "two rules of when to reset it; wrap once"
            )
        if (settings.gate or settings.reference) and not base.has_kl:
            raise ValueError(
                f"algorithm.base.beta: {innermost.name} has no KL to gate or to reset; "
                "give it a beta above 0, or leave algorithm.gate and algorithm.reference out"
            )
        if settings.diversity and plugin_of(base).needs(base).images_per_prompt < 2:
            raise ValueError(
                f"algorithm.diversity: {innermost.name} has no advantages; leave it out"
            )

    @classmethod
    def needs(cls, settings: GardoSettings) -> Needs:
        wanted = []
        if settings.gate:
            wanted.append(RewardNeed("auxiliary", "gate", why=" to compare the proxy with"))
        if settings.diversity:
            field, name = "diversity.features", settings.diversity.features
            wanted.append(RewardNeed("features", field, name))
        needs = super().needs(settings).with_rewards(*wanted)
        if settings.gate and settings.has_kl and "reference" in needs.teachers:
            gated = {**needs.teachers, "reference": settings.gate.fraction}
            needs = replace(needs, teachers=gated)
        return needs

    def measured(self, scores: Scores) -> Scores:
        """With the distances `nearest` and `pairwise` of the features within groups."""
        scores = super().measured(scores)
        if not self.settings.diversity:
            return scores
        assert scores.features_BD is not None  # the recipe has them: `needs`
        distances = METRICS[self.settings.diversity.metric]
        nearest_B, pairwise_B = distances(scores.features_BD, scores.group_B, self.world.kernels)
        found = {"nearest": nearest_B, "pairwise": pairwise_B}
        return replace(scores, measures={**scores.measures, **found})

    def credit(self, scores: Scores) -> Credit:
        return self._gated(self._diverse(super().credit(scores), scores), scores)

    def _diverse(self, credit: Credit, scores: Scores) -> Credit:
        """Positive advantages scaled by how far an image is from the nearest of its group."""
        if not self.settings.diversity:
            return credit
        nearest_B, pairwise_B = scores.measures["nearest"], scores.measures["pairwise"]
        factor_B = diversity_factor(
            nearest_B,
            credit.advantage_B,
            scores.valid_B,
            scores.group_B,
            self.settings.diversity.normalise,
        )
        return replace(credit, advantage_B=credit.advantage_B * factor_B).with_info(
            nearest=float(nearest_B.mean()), diversity=100 * float(pairwise_B.mean())
        )

    def _gated(self, credit: Credit, scores: Scores) -> Credit:
        """The KL on the most uncertain samples alone."""
        if not self.gate:
            return credit
        gate_B, statistic = self.gate.select(scores)
        if not self.gate.settings.zero_advantage:
            gate_B = gate_B & (credit.advantage_B != 0)
        return replace(credit, gate_B=gate_B).with_info(
            uncertainty=statistic, gate_fraction=self.gate.fraction
        )

    def after_update(self, slots: SlotMoves) -> None:
        super().after_update(slots)
        if self.reference:
            self.reference.updates += 1

    def after_step(self, slots: SlotMoves, metrics: Metrics) -> list[str]:
        events = super().after_step(slots, metrics)
        if self.reference:
            self.reference.iterations += 1
            reason = self.reference.why_due(metrics[self.reference.metric])
            if reason:
                slots.copy("train", to="reference")
                self.reference.updates = self.reference.iterations = 0
                self.reference_reset()
                events = [*events, f"reference reset ({reason})"]
        return events

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "gate": self.gate.state_dict() if self.gate else None,
            "reference": self.reference.state_dict() if self.reference else None,
        }

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        if self.gate and state["gate"]:  # else the recipe has just got one
            self.gate.load_state_dict(state["gate"])
        if self.reference and state["reference"]:
            self.reference.load_state_dict(state["reference"])


PLUGIN = Gardo

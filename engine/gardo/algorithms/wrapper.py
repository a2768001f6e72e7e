"""An algorithm around another: what a wrapper does not mention is its base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from gardo.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    Context,
    Needs,
    SamplerSettings,
    SlotMoves,
    World,
    plugin_of,
    settings_of,
)
from gardo.types import Batch, Credit, Metrics, Points, Rollout, SamplePlan, Scores

if TYPE_CHECKING:
    from torch import Tensor


class WrapperSettings(AlgorithmSettings):
    base: Any = Field(description="the algorithm that is wrapped, with its own fields")

    @field_validator("base")
    @classmethod
    def _base_settings(cls, value: Any) -> AlgorithmSettings:
        try:
            return settings_of(value)
        except ValueError as error:
            raise ValueError(f"base: {error}") from None

    @property
    def has_kl(self) -> bool:
        return bool(self.base.has_kl)

    def kl_weights(self, gated: int, samples: int) -> tuple[float, float]:
        weights: tuple[float, float] = self.base.kl_weights(gated, samples)
        return weights

    def layers(self) -> list[AlgorithmSettings]:
        """These settings and those of all that they wrap, outermost first."""
        inner = self.base.layers() if isinstance(self.base, WrapperSettings) else [self.base]
        return [self, *inner]


class Wrapper(Algorithm):
    """An algorithm around the one of `settings.base`; what a wrapper does not mention is its."""

    Settings: ClassVar[type[AlgorithmSettings]] = WrapperSettings

    def __init__(self, settings: Any, world: World) -> None:
        self.base = plugin_of(settings.base)(settings.base, world)
        super().__init__(settings, world)
        self.contract = self.base.contract

    @classmethod
    def needs(cls, settings: Any) -> Needs:
        return plugin_of(settings.base).needs(settings.base).inside("base")

    @classmethod
    def rows_per_sample(cls, settings: Any, sampler: SamplerSettings) -> int:
        return plugin_of(settings.base).rows_per_sample(settings.base, sampler)

    @classmethod
    def slots_of(cls, settings: Any) -> tuple[str, ...]:
        return plugin_of(settings.base).slots_of(settings.base)

    @classmethod
    def check(cls, settings: Any, sampler: SamplerSettings) -> None:
        plugin_of(settings.base).check(settings.base, sampler)

    @property
    def has_kl(self) -> bool:
        return self.base.has_kl

    def kl_weights(self, gated: int, samples: int) -> tuple[float, float]:
        return self.base.kl_weights(gated, samples)

    def plan(self, step: int) -> SamplePlan:
        return self.base.plan(step)

    def trajectory_kl(self, rollout: Rollout) -> Tensor | None:
        return self.base.trajectory_kl(rollout)

    def measured(self, scores: Scores) -> Scores:
        return self.base.measured(scores)

    def credit(self, scores: Scores) -> Credit:
        return self.base.credit(scores)

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        return self.base.points(rollout, credit)

    def teachers(self, points: Points, credit: Credit) -> dict[str, Tensor]:
        return self.base.teachers(points, credit)

    def weightless(self, points: Points, credit: Credit) -> Tensor | None:
        return self.base.weightless(points, credit)

    def log_ratio(self, batch: Batch, velocity_RX: Tensor) -> Tensor:
        return self.base.log_ratio(batch, velocity_RX)

    def loss(self, ctx: Context, batch: Batch) -> tuple[Tensor, Metrics]:
        return self.base.loss(ctx, batch)

    def after_update(self, slots: SlotMoves) -> None:
        self.base.after_update(slots)

    def after_step(self, slots: SlotMoves, metrics: Metrics) -> list[str]:
        return self.base.after_step(slots, metrics)

    def reference_reset(self) -> None:
        self.base.reference_reset()

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.base.load_state_dict(state["base"])

"""The algorithm protocol: everything that Flow-GRPO, DiffusionNFT, ReFL and GARDO disagree about.

The loop never asks which it is.

Shapes: B samples (of all ranks in `credit`, of this rank elsewhere), R training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, Field, model_validator

import gardo_kernels
from gardo.contract import NoRatio, RatioContract
from gardo.flow import Sde, Transitions, shifted_linear_sigmas, transitions
from gardo.plugins import resolve
from gardo.settings import Strict
from gardo.types import (
    Batch,
    Credit,
    Metrics,
    Points,
    Rollout,
    SamplePlan,
    Scores,
    to_device,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gardo_kernels import Backend


class SamplerSettings(Strict):
    """How training samples are drawn."""

    steps: int = Field(ge=2, le=1000, description="denoise steps T")
    train_steps: int = Field(
        ge=1, description="steps of a sample that are trained; the algorithm says which"
    )
    sde: Sde = Field(
        "flow",
        description="a step's noise: flow, Flow-GRPO's (grows with sigma); dance: constant; "
        "cps: keeps the noise that the schedule says",
    )
    noise_level: float = Field(0.7, gt=0, description="the sampler's a or eta")
    same_initial_noise: bool = Field(
        False,
        description="the images of a prompt start from one noise and differ by that of the steps",
    )
    schedule: Literal["model", "shifted_linear"] = Field(
        "model", description="the model family's sigmas, or linear ones that are shifted once"
    )
    shift: float | None = Field(None, gt=0, description="of shifted_linear; 3 if left out")
    model_time: Literal["exact", "integer"] = Field(
        "exact", description="what the model is told of sigma: all of it, or whole thousandths"
    )

    @model_validator(mode="after")
    def _shift_has_an_effect(self) -> Self:
        if self.shift is not None and self.schedule == "model":
            raise ValueError(
                f"shift: {self.shift} has no effect on schedule model; give schedule: "
                "shifted_linear, or leave shift out"
            )
        return self

    def sigmas(self, of_model: Callable[[int], Tensor]) -> Tensor:
        """The schedule, [T + 1] float64; `of_model` makes the model family's own."""
        schedules = {"model": of_model, "shifted_linear": self._shifted_linear}
        return schedules[self.schedule](self.steps)

    def _shifted_linear(self, steps: int) -> Tensor:
        return shifted_linear_sigmas(steps, self.shift or 3.0)


class AlgorithmSettings(Strict):
    name: str = Field(description="which algorithm: a built-in name, or module:Class of your own")

    @property
    def has_kl(self) -> bool:
        """Whether `Credit.gate_B` matters: the loss has a KL to a reference."""
        return False

    def kl_weights(self, gated: int, samples: int) -> tuple[float, float]:
        """What the KL weighs in the mean over an update's rows: of a gated row, of another one.

        `gated` of the update's `samples`, of all ranks, are gated.
        """
        return 1.0, 0.0


class DecaySettings(Strict):
    """How slowly a slot follows the weights after n gradient steps.

    slot <- d slot + (1 - d) train with d = min(slope max(n - start, 0), limit).
    """

    slope: float = Field(0.001, ge=0, description="what d grows by with each gradient step")
    start: int = Field(
        0,
        ge=0,
        description="gradient steps before d grows; until then the slot is the weights",
    )
    limit: float = Field(0.5, ge=0, lt=1, description="the largest d")

    def rate(self, n: int) -> float:
        return min(self.slope * max(n - self.start, 0), self.limit)


@dataclass(frozen=True)
class World:
    """What an algorithm may know of the run: its sampler, schedule, seed, kernels and updates."""

    sampler: SamplerSettings
    sigmas: Tensor  # [T + 1] float64
    seed: int
    kernels: Backend = "auto"
    updates: int = 1  # gradient steps an iteration
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def transitions(
        self, variant: str | Sequence[str], sigmas: Tensor | None = None
    ) -> Transitions:
        """The sampler's table, with its noise level and model time, for its schedule or another.

        Made once a run, and so sent to a device once.
        """
        schedule = self.sigmas if sigmas is None else sigmas
        variants = variant if isinstance(variant, str) else tuple(variant)
        key = variants, tuple(schedule.tolist())
        if key not in self._made:
            self._made[key] = transitions(
                schedule,
                variants,
                self.sampler.noise_level,
                model_time=self.sampler.model_time,
            )
        table: Transitions = self._made[key]
        return table

    def seed_on(self, device: torch.device) -> Tensor:
        """The seed as kernels read it, int64 [1]; sent to a device once a run."""
        if device not in self._made:
            self._made[device] = to_device(gardo_kernels.seed_tensor(self.seed, "cpu"), device)
        sent: Tensor = self._made[device]
        return sent


class Context(Protocol):
    """What a loss may call."""

    def velocity(self, batch: Batch) -> Tensor:
        """The trained model's velocity at the batch's rows, in its dtype, with gradients.

        A loss does its arithmetic in fp32: bf16 differences of velocities would be rounded.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, with gradients."""

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """The differentiable proxy reward of images, fp32 [R]."""


class SlotMoves(Protocol):
    """What an algorithm may do to slots."""

    def copy(self, source: str, *, to: str) -> None: ...
    def decay(self, name: str, rate: float) -> None: ...


@dataclass(frozen=True)
class RewardNeed:
    """A reward that an algorithm wants besides the proxies."""

    role: str
    field: str  # of the algorithm's settings, that asks for it
    name: str | None = None  # None: any reward of the role
    why: str = ""


@dataclass(frozen=True)
class Needs:
    """What an algorithm wants of a recipe."""

    images_per_prompt: int = 1  # 2 where it compares the images of a prompt: it has advantages
    differentiable: bool = False  # gradients of the proxies
    rewards: tuple[RewardNeed, ...] = ()
    teachers: Mapping[str, float] = field(default_factory=dict)  # weights -> share of the rows

    def inside(self, section: str) -> Needs:
        """The same, asked for by the fields of a section."""
        return replace(
            self, rewards=tuple(replace(r, field=f"{section}.{r.field}") for r in self.rewards)
        )

    def with_rewards(self, *more: RewardNeed) -> Needs:
        return replace(self, rewards=(*self.rewards, *more))


class Algorithm:
    """Base of the algorithms; `settings` is its own Settings."""

    Settings: ClassVar[type[AlgorithmSettings]]

    def __init__(self, settings: Any, world: World) -> None:
        self.settings = settings
        self.world = world
        self.slots = self.slots_of(settings)
        self.contract: RatioContract | NoRatio = NoRatio()

    @classmethod
    def needs(cls, settings: Any) -> Needs:
        return Needs()

    @classmethod
    def rows_per_sample(cls, settings: Any, sampler: SamplerSettings) -> int:
        """Training rows that each sample becomes."""
        return sampler.train_steps

    @classmethod
    def slots_of(cls, settings: Any) -> tuple[str, ...]:
        """Copies of the trained weights that it needs: "reference", "old", "ema"."""
        return ()

    @classmethod
    def check(cls, settings: Any, sampler: SamplerSettings) -> None:
        """ValueError where the sampler cannot serve this algorithm; names field and mend."""

    @property
    def has_kl(self) -> bool:
        """As `AlgorithmSettings.has_kl`."""
        return bool(self.settings.has_kl)

    def kl_weights(self, gated: int, samples: int) -> tuple[float, float]:
        """As `AlgorithmSettings.kl_weights`."""
        weights: tuple[float, float] = self.settings.kl_weights(gated, samples)
        return weights

    def plan(self, step: int) -> SamplePlan:
        raise NotImplementedError  # pragma: no cover

    def trajectory_kl(self, rollout: Rollout) -> Tensor | None:
        """[B], for `Scores.kl_B`; None where credit does not look at it."""
        return None

    def measured(self, scores: Scores) -> Scores:
        """The gathered batch with what credit needs of the features in `measures`.

        Here, and here alone, scores are on the device, and have features.
        """
        return scores

    def credit(self, scores: Scores) -> Credit:
        """Advantages and gates of the gathered batch, `measured`; scores and credit on the host."""
        raise NotImplementedError  # pragma: no cover

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        """The rows to train on."""
        raise NotImplementedError  # pragma: no cover

    def teachers(self, points: Points, credit: Credit) -> dict[str, Tensor]:
        """Whose velocities are needed where: {weights: bool [R]}, on the host."""
        return {}

    def weightless(self, points: Points, credit: Credit) -> Tensor | None:
        """Rows whose loss and gradient are 0 whatever the model says, bool [R] on the host.

        None: no row is. Asked before any teacher has spoken.
        """
        return None

    def log_ratio(self, batch: Batch, velocity_RX: Tensor) -> Tensor:
        """[R], for the ratio contract; only algorithms with a ratio are asked."""
        raise NotImplementedError  # pragma: no cover

    def loss(self, ctx: Context, batch: Batch) -> tuple[Tensor, Metrics]:
        raise NotImplementedError  # pragma: no cover

    def after_update(self, slots: SlotMoves) -> None:
        """After every gradient step."""

    def after_step(self, slots: SlotMoves, metrics: Metrics) -> list[str]:
        """After an iteration; `metrics` are sums over all of it and all ranks.

        Returns what happened, for the log.
        """
        return []

    def reference_reset(self) -> None:
        """The reference has just become a copy of the live weights (also at the start)."""

    def state_dict(self) -> dict[str, Any]:
        """All state of this object, JSON only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""


# ---- from a recipe's section to an algorithm -----------------------------------------------------


def settings_of(section: Any) -> AlgorithmSettings:
    """The settings of a mapping with a `name`; settings stay what they are.

    ValueError for a name that is unknown and for fields that do not fit.
    """
    if isinstance(section, BaseModel):
        return section  # type: ignore[return-value]
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise ValueError("settings of an algorithm, or a mapping with its name")
    return resolve("gardo.algorithms", section["name"]).Settings.model_validate(dict(section))


def plugin_of(settings: AlgorithmSettings) -> type[Algorithm]:
    """The algorithm that `settings.name` names."""
    plugin: type[Algorithm] = resolve("gardo.algorithms", settings.name)
    return plugin


def build(section: Mapping[str, Any] | AlgorithmSettings, world: World) -> Algorithm:
    """The algorithm of a recipe's `algorithm` section, or of its settings; wrappers hold their base

    ValueError where the section, or the world's sampler with it, cannot be used.
    """
    settings = settings_of(section)
    plugin = plugin_of(settings)
    plugin.check(settings, world.sampler)
    return plugin(settings, world)

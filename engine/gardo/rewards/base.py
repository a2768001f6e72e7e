"""The reward protocol: images and their prompts -> one value each, NaN where there is none.

A failure is NaN, never a zero: the panel masks what is not finite. Rewards that are
`differentiable` let gradients through to the images (ReFL). A judge of pairs has `compare` instead
of `score`, or both: preference.py makes a reward of it.

A prompt is a text with a mapping `metadata`: what a line of a .jsonl prompt file says beside it.

Shapes: B images of this rank, float32 [B, 3, H, W] in [0, 1]; N pairs of images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gardo.settings import Strict
from gardo.types import Phase, Prompt, Scores, no_phase

SCORING = ("score", "compare", "score_together")  # a reward has one of them, or more
Pending = Callable[[], Tensor]  # waits for values that are computed elsewhere
Role = Literal["proxy", "auxiliary", "held_out", "features"]


class RewardSettings(Strict):
    """What every reward may be told; a reward's own file adds its fields."""

    kind: str
    role: Role
    weight: float = Field(1.0, description="share in the sum of the proxies")
    every: int = Field(
        1, ge=1, description="iterations between two scorings while training, of a held-out reward"
    )
    where: str = Field(
        "here",
        pattern=r"^(here|worker|worker:[A-Za-z][A-Za-z0-9_-]*|https?://[^\s]+)$",
        description="here, in the training process; worker, or worker:NAME of scoring.workers, in "
        "a process of its own; or the URL of a `gardo rewards serve`",
    )

    @model_validator(mode="after")
    def _only_what_is_reported_waits(self) -> Self:
        if self.every > 1 and self.role != "held_out":
            raise ValueError(
                f"every: {self.every}: a reward of role {self.role} is needed in every iteration; "
                "use 1, or role: held_out"
            )
        return self

    def error_at(self, place: str, error: Exception) -> ValueError:
        """An error of this reward behind its place in the recipe; it may open with a field."""
        names_field = re.split(r"[.:]", str(error))[0] in type(self).model_fields
        return ValueError(f"{place}{'.' if names_field else ': '}{error}")


Weights = tuple[object, ...]  # which they are: equal for two models that have the same
Tower = tuple[object, ...]  # a part of a model that rewards of a panel have one copy of


@dataclass(frozen=True)
class Holds:
    """Of a field: the class, one of transformers', of the model that it names (`gardo plan`).

    `weights`: the fields that say which weights it has; the field itself, and that of its revision,
    if left out. `side`, `see`: of images if no image_size says so; how it sees them if not called.
    """

    class_name: str
    weights: tuple[str, ...] = ()
    side: int | None = None
    see: Callable[[Any, Tensor], Tensor] | None = None


class Held(NamedTuple):
    """A model of a reward: what its mark says, its configuration's folder or hub id, its weights"""

    mark: Holds
    path: str
    weights: Weights


def tower_of(weights: Weights, dtype: str, name: str, module: nn.Module) -> Tower:
    """What says that two models' modules of this name are the same."""
    return weights, weights_dtype(dtype), name, type(module).__name__


@dataclass(frozen=True)
class Gathering:
    """Where this rank's images stand among those of all ranks, and how to reach the others'."""

    sample_B: Tensor  # int64, index within the step over all ranks
    group_B: Tensor  # int64, prompt index within the step; groups may span ranks
    seed: int
    step: int
    gather: Callable[[Tensor], Tensor]  # tensors of all ranks, joined along the first axis


@dataclass(frozen=True)
class About:
    """What a user wants to know of a reward before using it: a row of `gardo rewards list`."""

    formula: str
    scale: str  # usual values
    licence: str = "-"  # of the default weights, as their publishers say it
    verified: str = "formula and preprocessing, on tiny random models; published weights: no"


class Reward:
    """Base of the rewards; `settings` is the reward's own Settings."""

    Settings: ClassVar[type[RewardSettings]]
    about: ClassVar[About | None] = None
    differentiable: ClassVar[bool] = False
    gives_features: bool = False
    scores_alone: bool = True  # an image has a score without others to compare with
    limits: tuple[float, float] = (-math.inf, math.inf)  # a value outside of them is a failure

    def __init__(self, settings: Any, device: torch.device) -> None:
        self.settings = settings
        self.device = device

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The value of each image, fp32 [B]; for features [B, D].

        NaN where an image has no value: it must not be used. Infinities count as NaN.
        """
        raise NotImplementedError  # pragma: no cover

    def meet(self, prompt: Prompt, size: tuple[int, int]) -> None:
        """ValueError, opening with its field, where what it needs elsewhere does not answer.

        The run's pictures have this size, height and width.
        """

    def begin(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Pending | None:
        """Begins `score` elsewhere; what is returned waits for it. None: it is computed here."""
        return None

    @property
    def trouble(self) -> str:
        """Why images had no value, the last time that they had none, as far as it is known."""
        return ""

    def close(self) -> None:
        """The run is over."""

    def compare(self, first_N3HW: Tensor, second_N3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """How sure a judge of pairs is of the first image, fp32 [N].

        The probability that it is the better one, or 1, 0.5 for a tie and 0; NaN where no verdict
        could be read.
        """
        raise NotImplementedError  # pragma: no cover

    def score_together(
        self, images_B3HW: Tensor, prompts: Sequence[Prompt], place: Gathering
    ) -> Tensor:
        """As `score`, in training; for rewards that look at whole groups. All ranks call it."""
        return self.score(images_B3HW, prompts)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Inside, matrix products of float32 are what `dtype` says: in TF32 or not, on a GPU.

        A reward without a `dtype` leaves them as they are.
        """
        products = torch.backends.cuda.matmul
        before = products.allow_tf32
        if self.in_tf32 is not None:
            products.allow_tf32 = self.in_tf32
        try:
            yield
        finally:
            products.allow_tf32 = before

    @property
    def in_tf32(self) -> bool | None:
        """None where the reward does not say."""
        dtype = getattr(self.settings, "dtype", None)
        return None if dtype is None else dtype == "tf32"

    @classmethod
    def check(cls, settings: Any, images_per_prompt: int) -> None:
        """ValueError, opening with the field, where the settings cannot serve such groups."""
        if provides(cls, "compare") and not provides(cls, "score"):
            raise ValueError(
                f"kind: {settings.kind} compares images and scores none; use kind: preference "
                f"with judge: {{kind: {settings.kind}}}"
            )
        if not any(provides(cls, method) for method in SCORING):
            raise ValueError(
                f"kind: {settings.kind} has no score; give it "
                "`def score(self, images_B3HW, prompts)`"
            )
        if settings.where != "here" and provides(cls, "score_together"):
            raise ValueError(
                f"where: {settings.where}: {settings.kind} looks at groups, which are here; leave "
                "it out (its judge may be elsewhere)"
            )

    @classmethod
    def holds(cls, settings: Any) -> list[Held] | None:
        """Its models on the device. None: not known. For `gardo plan`."""
        if ":" in settings.kind:
            return None
        return [
            Held(mark, getattr(settings, field), weights_of(settings, field))
            for field, about in type(settings).model_fields.items()
            for mark in about.metadata
            if isinstance(mark, Holds)
        ]

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        """ValueError where this reward could never score the prompt.

        Called for every prompt before training.
        """


def weights_of(settings: Any, field: str) -> Weights:
    """Which weights the model has that a field names, by what `Holds` says of it."""
    revision = "revision" if field == "path" else f"{field}_revision"
    marks = type(settings).model_fields[field].metadata
    (said,) = (mark.weights for mark in marks if isinstance(mark, Holds))
    return tuple(getattr(settings, name) for name in said or (field, revision))


def weights_dtype(dtype: str) -> torch.dtype:
    """Of the weights of a reward's model, by its `dtype`."""
    found: torch.dtype = getattr(torch, "float32" if dtype == "tf32" else dtype)
    return found


def provides(plugin: type[Reward], method: str) -> bool:
    """Whether a reward has its own `score`, `compare` or `score_together`."""
    return getattr(plugin, method) is not getattr(Reward, method)


def within(value: Tensor, limits: tuple[float, float]) -> Tensor:
    """The values; NaN where one lies outside of the limits."""
    low, high = limits
    if (low, high) == Reward.limits:
        return value
    return value.where((value >= low) & (value <= high), torch.nan)


class Panel:
    """All rewards of a recipe, scored together."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = dict(rewards)
        self.phase: Phase = no_phase  # what measures them

    def close(self) -> None:
        for reward in self.rewards.values():
            reward.close()

    def names(self, role: Role) -> tuple[str, ...]:
        return tuple(n for n, r in self.rewards.items() if r.settings.role == role)

    @torch.no_grad()
    def __call__(
        self,
        images_B3HW: Tensor,
        prompts: Sequence[Prompt],
        *,
        sample_B: Tensor,
        group_B: Tensor,
        seed: int = 0,
        step: int = 0,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        said: Mapping[str, Tensor | Pending] | None = None,
    ) -> Scores:
        """Scores of this rank's images; non-finite values are masked. All ranks call it.

        Held-out rewards are scored in the steps that their `every` divides. What `alone` has
        `said` of these images is not asked again; what it has begun is waited for.
        """
        place = Gathering(sample_B, group_B, seed, step, gather)
        said = {**self._begun(images_B3HW, prompts, step, but=said or ()), **(said or {})}
        answers = {}
        for name, reward in self._due(step).items():
            ask = partial(reward.score_together, images_B3HW, prompts, place)
            answers[name] = said[name] if name in said else self._asked(name, ask, len(prompts))
        values: dict[str, Tensor] = {}
        features = None
        features_valid_B = torch.ones(len(prompts), dtype=torch.bool, device=images_B3HW.device)
        for name, answer in answers.items():
            if isinstance(answer, Tensor):
                value = answer
            else:
                value = self._asked(name, answer, len(prompts), waits=True)
            if self.rewards[name].gives_features:
                features_valid_B = value.isfinite().all(-1)
                features = torch.where(features_valid_B[:, None], value.float(), 0.0)
            else:
                values[name] = value.float()
        masks = {name: value.isfinite() for name, value in values.items()}
        proxies = self.names("proxy")
        proxy_B = torch.stack([self.rewards[n].settings.weight * values[n] for n in proxies]).sum(0)
        needed = [masks[n] for n in (*proxies, *self.names("auxiliary"))]
        valid_B = torch.stack([*needed, features_valid_B]).all(0)
        return Scores(
            sample_B=sample_B,
            group_B=group_B,
            proxy_B=torch.where(valid_B, proxy_B, torch.zeros_like(proxy_B)),
            valid_B=valid_B,
            rewards=values,
            masks=masks,
            proxies={n: self.rewards[n].settings.weight for n in proxies},
            auxiliaries=self.names("auxiliary"),
            features_BD=features,
        )

    @torch.no_grad()
    def alone(
        self, images_B3HW: Tensor, prompts: Sequence[Prompt], step: int = 0
    ) -> dict[str, Tensor | Pending]:
        """What the rewards say that need no other image: some of a rank's images, no collective.

        Those elsewhere begin first and are not waited for.
        """
        said: dict[str, Tensor | Pending] = {**self._begun(images_B3HW, prompts, step)}
        for name, reward in self._due(step).items():
            if name not in said and not provides(type(reward), "score_together"):
                ask = partial(reward.score, images_B3HW, prompts)
                said[name] = self._asked(name, ask, len(prompts))
        return said

    def _begun(
        self,
        images_B3HW: Tensor,
        prompts: Sequence[Prompt],
        step: int,
        but: Collection[str] = (),
    ) -> dict[str, Pending]:
        """The rewards elsewhere, asked for these images."""
        asked = {n: r for n, r in self._due(step).items() if n not in but}
        begun = {n: r.begin(images_B3HW, prompts) for n, r in asked.items()}
        return {name: pending for name, pending in begun.items() if pending}

    def _due(self, step: int) -> dict[str, Reward]:
        return {n: r for n, r in self.rewards.items() if step % r.settings.every == 0}

    def _asked(
        self, name: str, ask: Callable[[], Tensor], count: int, *, waits: bool = False
    ) -> Tensor:
        """What a reward says of so many images, measured and in the reward's precision."""
        reward = self.rewards[name]
        kind = "features" if reward.gives_features else "reward"
        with self.phase("remote" if waits else kind, rows=count):
            return self._checked(name, ask, count)

    def score(self, name: str, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """What one reward says of images, [B], features [B, D]; with gradients, if it has any."""
        ask = partial(self.rewards[name].score, images_B3HW, prompts)
        return self._checked(name, ask, len(prompts))

    def _checked(self, name: str, ask: Callable[[], Tensor], count: int) -> Tensor:
        """The value of so many images. Whatever goes wrong in a reward names it."""
        reward = self.rewards[name]
        try:
            with reward.precision():
                value = ask()
        except Exception as error:
            error.add_note(f"rewards.{name}: {type(reward).__name__} failed")
            raise
        _check_shape(value, count, name, reward)
        return within(value, reward.limits)

    def differentiable_score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The weighted sum of the proxies with gradients to the images, fp32 [B]."""
        total = images_B3HW.new_zeros(len(images_B3HW))
        for name in self.names("proxy"):
            weight = self.rewards[name].settings.weight
            total = total + weight * self.score(name, images_B3HW, prompts)
        return total


def _check_shape(value: Any, count: int, name: str, reward: Reward) -> None:
    """A value [B, 1], for one, would make [B, B] of the proxies' sum."""
    dimensions = 1 + reward.gives_features
    if isinstance(value, Tensor) and value.dim() == dimensions and len(value) == count:
        return
    given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    wanted = f"[{count}, D]" if reward.gives_features else f"[{count}]"
    raise ValueError(
        f"rewards.{name}: {type(reward).__name__}.score gave {given}; it must give a tensor "
        f"{wanted}, NaN where an image has no value"
    )

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from gardo.settings import Strict
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor, nn

SCORING = ("score", "compare", "score_together")  # a reward has one of them, or more
Pending = Callable[[], "Tensor"]  # waits for values that are computed elsewhere
Role = Literal["proxy", "auxiliary", "held_out", "features"]


class RewardSettings(Strict):
    """What every reward may be told; a reward's own file adds its fields."""

    of_the_client: ClassVar[set[str]] = {"role", "weight", "every", "where"}  # no server's matter
    kind: str = Field(
        description="which reward: a built-in name, or module:Class of your own; the section's "
        "name if left out",
    )
    role: Role = Field(
        description="proxy: optimised; auxiliary: the gate compares the proxy with it; "
        "held_out: only reported; features: for diversity",
    )
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
    gated: bool = False  # the default weights: their licence is accepted on their page


class Reward:
    """Base of the rewards; `settings` is the reward's own Settings."""

    Settings: ClassVar[type[RewardSettings]]
    about: ClassVar[About | None] = None
    differentiable: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()  # beside gardo's own, of its extra `rewards`
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

    @property
    def at_once(self) -> int:
        """Pairs that a judge of pairs is best asked about together, at least."""
        return 0

    @property
    def exchange(self) -> str:
        """A question and its answer in full, the last one with a value: `gardo rewards check`."""
        return ""

    def costs(self) -> dict[str, float] | None:
        """What its questions to a model have taken since it was asked last. None: it has none."""
        return None

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

    @classmethod
    def check_for(cls, settings: Any, prompt: Prompt) -> None:
        """As `check_prompt`, of a reward with these settings."""
        cls.check_prompt(prompt)


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

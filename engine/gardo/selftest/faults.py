"""What a recipe can put into a run from outside: plug-ins with a flaw, `gardo.selftest.faults:X`.

Iterations are counted from 1, as metrics.jsonl counts them.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gardo.algorithms.wrapper import Wrapper, WrapperSettings
from gardo.rewards.base import Reward, RewardSettings
from gardo.types import Batch, Metrics, Prompt, SamplePlan


class FlawedSettings(WrapperSettings):
    at: list[int]  # iterations
    flaw: Literal["gradient", "loss", "ratio"] = "gradient"
    rank: int | None = None  # of that rank alone


class Flawed(Wrapper):
    """An algorithm whose loss, its gradient or its ratio is NaN in some iterations."""

    Settings: ClassVar[type[WrapperSettings]] = FlawedSettings
    _iteration = 0

    def plan(self, step: int) -> SamplePlan:
        self._iteration = step + 1
        return self.base.plan(step)

    def loss(self, ctx: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        loss, metrics = self.base.loss(ctx, batch)
        if self.settings.flaw == "ratio" or not self._is_flawed():
            return loss, metrics
        if self.settings.flaw == "loss":
            return loss * float("nan"), metrics
        return _NaNGradient.apply(loss), metrics  # type: ignore[no-untyped-call]

    def log_ratio(self, batch: Batch, velocity_RX: Tensor) -> Tensor:
        log_ratio_R = self.base.log_ratio(batch, velocity_RX)
        flawed = self.settings.flaw == "ratio" and self._is_flawed()
        return log_ratio_R * float("nan") if flawed else log_ratio_R

    def _is_flawed(self) -> bool:
        return self._iteration in self.settings.at and is_rank(self.settings.rank)


def is_rank(wanted: int | None) -> bool:
    """Whether this process is the rank that is wanted; None: any."""
    if wanted is None or not torch.distributed.is_initialized():
        return True
    return bool(torch.distributed.get_rank() == wanted)


class _NaNGradient(torch.autograd.Function):
    """The value, with a NaN for its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0] * float("nan")


class OddSettings(RewardSettings):
    nan_at: list[int] = []  # calls
    nan_from: int = 1_000_000


class Odd(Reward):
    """How bright an image is; NaN for all images of some calls, the first being 1."""

    Settings = OddSettings
    _calls = 0

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self._calls += 1
        value = images_B3HW.mean((1, 2, 3))
        bad = self._calls in self.settings.nan_at or self._calls >= self.settings.nan_from
        return value * float("nan") if bad else value


class NoRoomSettings(RewardSettings):
    full_at: list[int] = []  # calls
    hang_up_at: int = 0


class NoRoom(Reward):
    """How bright an image is; in some calls the disk is full until the next one, or nobody reads
    standard output any more.

    A full disk is a process that may make no file larger: a limit of the system, whose error
    comes from the same calls.
    """

    Settings = NoRoomSettings
    _calls = 0

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self._calls += 1
        full = self._calls in self.settings.full_at
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if full else hard, hard))
        if self._calls == self.settings.hang_up_at:
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, 1)
            os.close(write)
        return images_B3HW.mean((1, 2, 3))


class DisturbingSettings(RewardSettings):
    at: list[int] = []  # calls
    signal: int | None = None  # sent to this process; None: the call never ends
    rank: int | None = None  # of that rank alone


class Disturbing(Reward):
    """How bright an image is; while some calls last, the first being 1, its process is asked to
    end, or hangs."""

    Settings = DisturbingSettings
    _calls = 0

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self._calls += 1
        if self._calls in self.settings.at and is_rank(self.settings.rank):
            if self.settings.signal is None:
                time.sleep(3600)
            else:
                os.kill(os.getpid(), self.settings.signal)
        return images_B3HW.mean((1, 2, 3))

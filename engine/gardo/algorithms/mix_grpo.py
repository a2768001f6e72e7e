"""MixGRPO (arXiv 2507.21802): a window of SDE steps that moves through an ODE sampler.

The window holds `sampler.train_steps` = w of the T steps, and nothing else is trained. The last
step is never in it, so it starts at 0 .. T - 1 - w. Where it stands is a function of the iteration
(and of the seed, if it is drawn), so that a resume needs no state. With m = T - 2, the last step
that is trained:

    progressive   25 iterations at each start, then on by `stride`
    random        drawn each iteration, uniform in 0 .. m - w
    decay         int(10 (1 - p) + p) iterations at a start, p = start / m
    exp_decay     ceil(25 e^(-0.1 relu(start - 13))) iterations at a start
    frozen        always at the same start

A window that moves goes back to the first start after the last one. (The release lets it run out at
the end: it shrinks to nothing there, and an iteration trains no step at all.)

`flash` is MixGRPO-Flash: the x steps after the window become int(flash x), at least one, of
DPM-Solver++(2M), which begins at first order. 0.4 is Flash, 0.2 with a frozen window Flash*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from gardo.algorithms.base import SamplerSettings
from gardo.algorithms.flow_grpo import ClippedSettings, FlowGRPO
from gardo.algorithms.flow_grpo_fast import drawn_start
from gardo.flow import Transitions, compress_tail
from gardo.settings import Strict


def moving_start(starts: range, stay: Callable[[int], int], iteration: int) -> int:
    """Where a window is that stays stay(start) iterations at each start and then begins again."""
    visits = [start for start in starts for _ in range(stay(start))]
    return visits[iteration % len(visits)]


class Moving(Strict):
    """A window that goes through all starts."""

    stride: int = Field(1, ge=1, description="steps that the window moves on")

    def starts(self, steps: int, width: int) -> range:
        return range(0, steps - width, self.stride)

    def stay(self, start: int, last: int) -> int:
        """Iterations at a start; `last` is the last step that is trained."""
        raise NotImplementedError  # pragma: no cover

    def start(self, iteration: int, steps: int, width: int, seed: int) -> int:
        return moving_start(
            self.starts(steps, width), lambda at: self.stay(at, steps - 2), iteration
        )


class Progressive(Moving):
    kind: Literal["progressive"] = Field(
        "progressive",
        description="from the first steps to the last, the same time at each start",
    )
    iterations: int = Field(25, ge=1, description="at each start")

    def stay(self, start: int, last: int) -> int:
        return self.iterations


class Decay(Moving):
    kind: Literal["decay"] = Field(description="as progressive, ever shorter at later starts")
    most: int = Field(10, ge=1, description="iterations at start 0")
    fewest: int = Field(1, ge=1, description="iterations at the last trained step")

    def stay(self, start: int, last: int) -> int:
        return (self.most * (last - start) + self.fewest * start) // max(last, 1)


class ExpDecay(Moving):
    kind: Literal["exp_decay"] = Field(
        description="as progressive, exponentially shorter past `after`",
    )
    iterations: int = Field(25, ge=1, description="at the starts up to `after`")
    after: int = Field(13, ge=0, description="the start from which the time shrinks")
    rate: float = Field(0.1, gt=0, description="how fast: exp(-rate) a step")

    def stay(self, start: int, last: int) -> int:
        return math.ceil(self.iterations * math.exp(-self.rate * max(start - self.after, 0)))


class Random(Strict):
    kind: Literal["random"] = Field(description="drawn in every iteration")

    def starts(self, steps: int, width: int) -> range:
        return range(steps - 1 - width)

    def start(self, iteration: int, steps: int, width: int, seed: int) -> int:
        return drawn_start(seed, iteration, len(self.starts(steps, width)))


class Frozen(Strict):
    kind: Literal["frozen"] = Field(description="always at the same steps")
    at: int = Field(0, ge=0, description="the window's first step")

    def starts(self, steps: int, width: int) -> range:
        return range(self.at, min(self.at + 1, steps - width))

    def start(self, iteration: int, steps: int, width: int, seed: int) -> int:
        return self.at


Window = Annotated[Progressive | Random | Decay | ExpDecay | Frozen, Field(discriminator="kind")]


class MixGRPOSettings(ClippedSettings):
    name: Literal["mix_grpo"] = "mix_grpo"
    window: Window = Field(
        Progressive(),
        description="where the steps are that are stochastic and trained, and how they move",
    )
    flash: float | None = Field(
        None, gt=0, lt=1, description="share of the steps after the window that DPM-Solver++ makes"
    )


class MixGRPO(FlowGRPO):
    Settings = MixGRPOSettings

    @classmethod
    def check(cls, settings: MixGRPOSettings, sampler: SamplerSettings) -> None:
        super().check(settings, sampler)
        steps, width, window = sampler.steps, sampler.train_steps, settings.window
        if not window.starts(steps, width):
            fitting = [w for w in range(1, width) if window.starts(steps, w)]
            mend = f"at most {fitting[-1]}" if fitting else "more sampler.steps"
            raise ValueError(
                f"sampler.train_steps: a {window.kind} window of {width} has no place before the "
                f"last of {steps} steps; {mend}"
            )

    def recorded(self, step: int) -> range:
        """The window."""
        sampler = self.world.sampler
        start = self.settings.window.start(
            step, sampler.steps, sampler.train_steps, self.world.seed
        )
        return range(start, start + sampler.train_steps)

    def transitions(self, step: int) -> Transitions:
        window, sampler, sigmas = self.recorded(step), self.world.sampler, self.world.sigmas
        after, solver = sampler.steps - window.stop, "ode"
        if self.settings.flash is not None:
            after, solver = max(1, int(self.settings.flash * after)), "dpm2"
            sigmas = compress_tail(sigmas, window.stop, after)
        variants = ["ode"] * window.start + [sampler.sde] * len(window) + [solver] * after
        return self.world.transitions(variants, sigmas)


PLUGIN = MixGRPO

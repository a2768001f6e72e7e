"""The ratio contract: training numerics must agree with sampling's.

That is asked before the first update of an iteration. On identical weights the policy ratio is 1.
In practice rollout and training run in different batch shapes, dtypes or attention backends, and
the difference can be as large as the clip range, which is 1e-4: then every gradient is noise. So
max |ratio - 1| over all ranks, by the forward pass of each rank's first micro-batch, is compared
with the clip range before anything is trained on it. The host reads that number, once an iteration,
and waits for it: whether to go on is its decision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gardo.types import Points

OldVelocity = Literal["rollout", "recompute", "auto"]
CAUSES = "dtype, batch shape of rollout and training, a slot left exchanged, the attention backend"


class RatioContractBroken(RuntimeError):
    """Recomputed old velocities still disagree with the training numerics."""


@dataclass
class RatioContract:
    """`mode` as in the recipe's `old_velocity`; `share` of the clip range is the limit.

    In `hold(points, probe, recompute)`, `probe(points)` gives max |ratio - 1| over all ranks,
    `recompute(points)` gives the points with old velocities made in the training numerics. The last
    probe's value is kept as `error`, and what was done as `event`.
    """

    mode: OldVelocity
    clip_range: float
    share: float = 0.5
    error: float = float("nan")
    event: str | None = field(default=None)

    def hold(
        self,
        points: Points,
        probe: Callable[[Points], float],
        recompute: Callable[[Points], Points],
    ) -> Points:
        self.event = None
        if self.mode == "recompute":
            points = recompute(points)
        self.error = probe(points)
        if self.error <= self.share * self.clip_range:
            return points
        seen = (
            f"max |ratio - 1| = {self.error:.2e} on identical weights, "
            f"clip range {self.clip_range:.0e}"
        )
        if self.mode == "rollout":
            self.event = f"ratio contract: {seen}"
            warnings.warn(f"{seen}: likely causes: {CAUSES}", stacklevel=2)
            return points
        if self.mode == "auto":
            self.event = f"old velocities recomputed: {seen}"
            points = recompute(points)
            self.error = probe(points)
        if not self.error <= self.clip_range:
            raise RatioContractBroken(
                f"max |ratio - 1| = {self.error:.2e} after the old velocities were recomputed in "
                f"the training numerics, past the clip range {self.clip_range:.0e}: something "
                f"differs between two runs of one model ({CAUSES}). Lower the noise in the model's "
                "output, or raise algorithm.clip_range."
            )
        return points


class NoRatio:
    """The contract of an algorithm without a policy ratio: nothing to hold."""

    error = float("nan")
    event: str | None = None

    def hold(self, points: Points, *_: object) -> Points:
        return points

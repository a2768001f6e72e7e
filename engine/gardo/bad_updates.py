"""Updates that are not made, because a number is not finite: counted, and when they end the run.

An engine leaves an update out where its loss or gradient norm is not finite on any rank (every rank
sees the norm of all). So is the whole of an iteration in which too many samples have no reward, or
the policy's ratio is not finite before anything was trained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gardo.settings import Strict
from gardo.types import Metrics

if TYPE_CHECKING:
    from torch import Tensor


class BadUpdateSettings(Strict):
    """When updates that could not be made end the run."""

    in_a_row: int = Field(3, ge=1, description="so many, one after another, end the run")
    share: float = Field(0.2, gt=0, le=1, description="this share of the last `window` does too")
    window: int = Field(50, ge=1, description="updates")


class RunStopped(RuntimeError):
    """A run that has ended itself; the message is for its user."""


@dataclass
class Made:
    """What the updates of an iteration came to; those that were left out count in `skipped`.

    void: why none of them may be made; "" where nothing is wrong.
    """

    void: str = ""
    totals: Metrics = field(default_factory=Metrics)
    norms: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # of all micro-batches, on the device
    skipped: int = 0
    _update: Metrics = field(default_factory=Metrics)

    def add(self, loss: Tensor, metrics: Metrics) -> None:
        """A micro-batch of the update that is being made."""
        self.losses.append(loss.detach())
        self._update.add(metrics)

    def end_update(self, norm: float, *, skipped: bool) -> None:
        if skipped:
            self.skipped += 1
        else:
            self.norms.append(norm)
            self.totals.add(self._update)
        self._update = Metrics()


class BadUpdates:
    """The same on all ranks, and part of a checkpoint."""

    def __init__(self, settings: BadUpdateSettings) -> None:
        self.settings = settings
        self.total = 0
        self.in_a_row = 0
        self._recent: deque[bool] = deque(maxlen=settings.window)

    def note(self, *, bad: bool) -> None:
        """An update has been made, or left out."""
        self.total += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self._recent.append(bad)

    def reason_to_stop(self) -> str | None:
        settings, recent = self.settings, self._recent
        if self.in_a_row >= settings.in_a_row:
            return f"{self.in_a_row} updates in a row could not be made"
        if len(recent) == settings.window and sum(recent) >= settings.share * settings.window:
            return f"{sum(recent)} of the last {settings.window} updates could not be made"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row, "recent": [*self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.in_a_row = int(state["total"]), int(state["in_a_row"])
        self._recent = deque(map(bool, state["recent"]), maxlen=self.settings.window)

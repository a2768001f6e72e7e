"""A call that may fail: tried again until its deadline, with pauses that grow and differ.

    pause before try n = min(longest, first 2^(n - 1)) * (a random share of 1/2 to 1)

A breaker keeps a server that is down from costing every call its deadline: after so many failed
calls one after another it lets none through for a while, then one, and all once that one is
answered.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import Field

from gardo.settings import Strict

Result = TypeVar("Result")


class CallSettings(Strict):
    """How long a reward elsewhere is waited for, and what then."""

    deadline: float = Field(
        120, gt=0, description="seconds that a call may take, all its tries together"
    )
    attempt: float = Field(60, gt=0, description="seconds that one try may take")
    retries: int = Field(10, ge=0, le=100, description="tries after the first, at most")
    first_pause: float = Field(0.5, gt=0, description="seconds before the second try; then twice")
    longest_pause: float = Field(15, gt=0, description="seconds between two tries, at most")
    breaker: int = Field(
        3, ge=1, description="calls failed in a row after which a server is left alone for a while"
    )
    cooldown: float = Field(30, gt=0, description="seconds of that while")


class Transient(Exception):
    """A try failed in a way that the next may not: no connection, 429, 5xx, an answer cut off."""

    def __init__(self, why: str, *, after: float | None = None) -> None:
        """`after`: seconds that the server asked to wait."""
        super().__init__(why)
        self.after = after


class CallFailed(Exception):
    """No answer within the limits; the message has the last reason and how often it was tried."""


class Breaker:
    """Open: calls fail at once. One a server; used by many threads."""

    def __init__(
        self, failures: int, cooldown: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._cooldown, self._clock = failures, cooldown, clock
        self._failed = 0
        self._closed_at = 0.0  # when a trial may go through
        self._why = ""
        self._lock = threading.Lock()

    def check(self) -> None:
        """CallFailed while open. When the time is up one caller may try, the others wait on."""
        with self._lock:
            if self._failed < self._limit:
                return
            left = self._closed_at - self._clock()
            if left > 0:
                raise CallFailed(f"left alone for {left:.0f} s more after: {self._why}")
            self._closed_at = self._clock() + self._cooldown

    def succeeded(self) -> None:
        with self._lock:
            self._failed = 0

    def failed(self, why: str) -> None:
        with self._lock:
            self._failed, self._why = self._failed + 1, why
            self._closed_at = self._clock() + self._cooldown


@dataclass
class Caller:
    """Makes calls by the settings; `sleep` and `clock` in seconds."""

    settings: CallSettings
    breaker: Breaker
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random

    def __call__(self, attempt: Callable[[float], Result]) -> Result:
        """`attempt(seconds)` raises Transient where it may be tried again. CallFailed at the end.

        Any other error is the caller's at once.
        """
        self.breaker.check()
        settings, end = self.settings, self.clock() + self.settings.deadline
        tries, why = 0, "no time for a try"
        while (left := end - self.clock()) > 0 and tries <= settings.retries:
            tries += 1
            try:
                result = attempt(min(left, settings.attempt))
            except Transient as error:
                why = str(error)
                pause = min(settings.longest_pause, settings.first_pause * 2 ** (tries - 1))
                pause = max(pause * (0.5 + 0.5 * self.draw()), error.after or 0.0)
                if tries <= settings.retries and self.clock() + pause < end:
                    self.sleep(pause)
                    continue
                break
            self.breaker.succeeded()
            return result
        self.breaker.failed(why)
        spent = settings.deadline - (end - self.clock())
        raise CallFailed(f"{why} ({tries} tries in {spent:.1f} s)")

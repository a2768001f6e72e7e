"""A call that may fail: tried again until its deadline, with pauses that grow and differ.

    pause before try n = min(longest, first 2^(n - 1)) * (a random share of 1/2 to 1)

A breaker keeps a server that is down from costing every call its deadline: after so many failed
calls one after another it lets none through for a while, then one, and all once that one is
answered. An answer with a status below 500 is a working server's, a refusal too; 500 is a failure
that is not tried again, 502 to 504 are tried again.
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
    """A try failed in a way that the next may not: no connection, 429, 503, an answer cut off."""

    def __init__(self, why: str, *, after: float | None = None, answered: bool = False) -> None:
        """`after`: seconds that the server asked to wait; `answered`: it is there, and busy."""
        super().__init__(why)
        self.after, self.answered = after, answered


class CallFailed(Exception):
    """No answer within the limits; the message has the last reason and how often it was tried."""

    def __init__(self, why: str, *, answered: bool = False) -> None:
        """`answered`: the server works, and refused (a status below 500)."""
        super().__init__(why)
        self.answered = answered


def first_line(error: Exception) -> str:
    """What an error says, as far as the first end of a line; its type if it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class Breaker:
    """Open: calls fail at once. One a server; used by many threads."""

    def __init__(
        self, failures: int, cooldown: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._cooldown, self._clock = failures, cooldown, clock
        self._failed = 0
        self._trial_from = 0.0  # when a trial may go through
        self._trying = False
        self._why = ""
        self._lock = threading.Lock()

    def check(self) -> bool:
        """Whether this call is the trial. CallFailed while open.

        When the time is up one caller tries, and the others fail on until it has its answer.
        """
        with self._lock:
            if self._failed < self._limit:
                return False
            left = self._trial_from - self._clock()
            if left > 0:
                raise CallFailed(f"left alone for {left:.0f} s more after: {self._why}")
            if self._trying:
                raise CallFailed(f"left alone while one call tries, after: {self._why}")
            self._trying = True
            return True

    def succeeded(self, *, trial: bool = False) -> None:
        with self._lock:
            self._failed = 0
            if trial:
                self._trying = False

    def failed(self, why: str, *, trial: bool = False) -> None:
        with self._lock:
            self._failed, self._why = self._failed + 1, why
            self._trial_from = self._clock() + self._cooldown
            if trial:
                self._trying = False


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

        Any other error is the caller's at once. The breaker counts every error as the server's
        failure, but those of a server that answered.
        """
        trial = self.breaker.check()
        try:
            result = self._tried(attempt)
        except Exception as error:
            if isinstance(error, CallFailed) and error.answered:
                self.breaker.succeeded(trial=trial)
            else:
                self.breaker.failed(first_line(error), trial=trial)
            raise
        self.breaker.succeeded(trial=trial)
        return result

    def _tried(self, attempt: Callable[[float], Result]) -> Result:
        settings, end = self.settings, self.clock() + self.settings.deadline
        tries, last = 0, Transient("no time for a try")
        while (left := end - self.clock()) > 0 and tries <= settings.retries:
            tries += 1
            try:
                return attempt(min(left, settings.attempt))
            except Transient as error:
                last = error
            pause = min(settings.longest_pause, settings.first_pause * 2 ** (tries - 1))
            pause = max(pause * (0.5 + 0.5 * self.draw()), last.after or 0.0)
            if tries > settings.retries or self.clock() + pause >= end:
                break
            self.sleep(pause)
        spent = settings.deadline - (end - self.clock())
        raise CallFailed(f"{last} ({tries} tries in {spent:.1f} s)", answered=last.answered)

"""What can go wrong in a run, put in from outside: a process group or a session with a flaw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gardo.distributed.base import Engine
from gardo.session import Session
from gardo.types import Credit, Points, Rollout


class Around:
    """Stands in for an object: what it does not do itself, the object does."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class AllGathers:
    """Counts the asynchronous all-gathers into one tensor: ZeRO-3's of weights, when a pass starts.

    (Those that DeepSpeed makes while it is set up are synchronous.) To be entered before the first
    process group, because DeepSpeed takes the function from torch then.
    """

    def __init__(self) -> None:
        self.count = 0
        self.fail_at: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += bool(kwargs["async_op"])
        if self.count == self.fail_at:
            raise torch.OutOfMemoryError("of the test's making")
        return self._gather(*args, **kwargs)

    def __enter__(self) -> AllGathers:
        self._gather, dist.all_gather_into_tensor = dist.all_gather_into_tensor, self
        return self

    def __exit__(self, *exception: object) -> None:
        dist.all_gather_into_tensor = self._gather


class Cut(Exception):
    """The death of a run."""


class CutShort(Around):
    """An engine that dies after so many gradient steps."""

    def __init__(self, engine: Engine, *, after: int) -> None:
        super().__init__(engine)
        self._left = after

    def step(self) -> bool:
        boundary = self.inner.step()
        self._left -= boundary
        if boundary and not self._left:
            raise Cut
        return boundary


class Stale(Around):
    """An algorithm whose recorded velocities are not those that the sampler used."""

    def points(self, rollout: Rollout, credit: Credit) -> Points:
        fresh = self.inner.points(rollout, credit)
        return fresh.with_velocity("rollout", fresh.velocities["rollout"] * 1.1)


@contextmanager
def memory_runs_out(gathers: AllGathers) -> Iterator[None]:
    """In the third gather: in the middle of the engine's try to gather once."""
    gathers.fail_at = gathers.count + 3
    yield
    gathers.fail_at = None


@contextmanager
def nothing(gathers: AllGathers) -> Iterator[None]:
    yield


def leave(session: Session) -> None:
    pass


def go_stale(session: Session) -> None:
    session.algorithm = Stale(session.algorithm)  # type: ignore[assignment]


@dataclass(frozen=True)
class Fault:
    opening: Callable[[AllGathers], Any] = nothing  # a context around the session's opening
    opened: Callable[[Session], None] = leave


FAULTS = {
    None: Fault(),
    "failing": Fault(opening=memory_runs_out),
    "stale": Fault(opened=go_stale),
}

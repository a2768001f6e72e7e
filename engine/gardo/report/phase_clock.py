"""Where an iteration's seconds, calls of models and peaks of memory go: a stopwatch of phases.

Phases may lie inside each other: a phase has what is not an inner one's, and what lies in none is
`other`. So the seconds of all add up to the wall clock. On a GPU they are those of its stream,
between events that are recorded where a phase begins and ends, and read when they are asked for:
the host waits for the GPU there and nowhere else. Every phase is an NVTX range there, and a range
of torch.profiler anywhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from gardo.report.memory import PeakMemory

OTHER = "other"


@dataclass
class Spent:
    """By a phase: seconds, calls of models, and rows (or images, or prompts) that these took."""

    seconds: float = 0.0
    calls: int = 0
    rows: int = 0


def fields(spent: dict[str, Spent]) -> dict[str, dict[str, float]]:
    """As a record has it: seconds of each phase, and calls and rows of those that have any."""
    called = {name: phase for name, phase in spent.items() if phase.calls}
    return {
        "seconds": {name: phase.seconds for name, phase in spent.items()},
        "calls": {name: phase.calls for name, phase in called.items()},
        "rows": {name: phase.rows for name, phase in called.items()},
    }


class PhaseClock:
    """Of this process and its device; `clock` gives seconds, increasing.

    `memory` has the peaks of the phases since it was last asked; `moves` counts phases entered and
    left, and calls of models: where it stands still, so does the run.
    """

    def __init__(
        self,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.memory = PeakMemory(device)
        self.moves = 0
        self._on_gpu = device.type == "cuda"
        self._thread = threading.get_ident()
        self._running: list[str] = []
        self._counts: dict[str, Spent] = {}
        self._marks: list[tuple[str, Any]] = [(OTHER, self._instant())]  # what runs from then on

    @property
    def running(self) -> str:
        """The innermost phase now running."""
        return self._running[-1] if self._running else OTHER

    @property
    def is_beside(self) -> bool:
        """Whether this is another thread than the one that is measured."""
        return threading.get_ident() != self._thread

    @contextmanager
    def phase(self, name: str, *, rows: int = 0) -> Iterator[None]:
        """Counts the block as the phase; entered again, it adds up. With rows it is a call.

        In another thread than the clock's own it has rows and no seconds: they pass beside.
        """
        if self.is_beside:
            if rows:
                self._count(name, rows)
            yield
            return
        with record_function(name), self._range(name):
            self._switch(lambda: self._running.append(name))
            if rows:
                self.count(rows)
            try:
                yield
            finally:
                self._switch(self._running.pop)

    def count(self, rows: int) -> None:
        """A call of a model with so many rows, in the phase now running."""
        self._count(self.running, rows)

    def _count(self, name: str, rows: int) -> None:
        self.moves += 1
        spent = self._counts.setdefault(name, Spent())
        spent.calls += 1
        spent.rows += rows

    def watch(self, model: nn.Module) -> None:
        """Counts every call of the model from now on; its first tensor has a row for each."""

        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            self.count(len(next(tensors)))

        model.register_forward_pre_hook(count, with_kwargs=True)

    def take(self) -> dict[str, Spent]:
        """What each phase has spent since the last call, in the order of their first beginning."""
        self._marks.append((self.running, self._instant()))
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        taken: dict[str, Spent] = {}
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            counted = self._counts.pop(name, None) or Spent()
            taken.setdefault(name, counted).seconds += seconds
        for name in list(self._counts):  # of phases that ran beside
            taken.setdefault(name, self._counts.pop(name))
        if OTHER in taken:
            taken[OTHER] = taken.pop(OTHER)  # last
        self._marks = self._marks[-1:]
        return taken

    def _switch(self, change: Callable[[], Any]) -> None:
        if self._running:
            self.memory.note(self.running)
        else:
            self.memory.forget()
        change()
        self.moves += 1
        self._marks.append((self.running, self._instant()))

    def _instant(self) -> Any:
        """Now: seconds, or an event in the GPU's stream."""
        if not self._on_gpu:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _range(self, name: str) -> AbstractContextManager[None]:
        return torch.cuda.nvtx.range(name) if self._on_gpu else nullcontext()

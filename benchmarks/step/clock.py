"""What an iteration's time went into, and how often the transformer ran."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn


class Clock:
    """Seconds by phase, one lap after the other; on a GPU no lap waits for the device.

    There a lap ends where its kernels end: events on the stream say when, at the end of the
    iteration.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[str, Any]] = []
        self._wall = 0.0

    def start(self) -> None:
        """Begins an iteration when what ran before is over."""
        self._wait()
        self._wall = time.perf_counter()
        self._laps = [("", self._mark())]

    def lap(self, phase: str) -> None:
        """What ran since the last lap was `phase`."""
        self._laps.append((phase, self._mark()))

    def stop(self) -> tuple[float, dict[str, float]]:
        """Seconds of the iteration, and of each of its phases; they sum to it."""
        self._wait()
        wall = time.perf_counter() - self._wall
        seconds: dict[str, float] = defaultdict(float)
        for (_, start), (phase, end) in zip(self._laps, self._laps[1:], strict=False):
            on_gpu = self._device.type == "cuda"
            seconds[phase] += start.elapsed_time(end) / 1e3 if on_gpu else end - start
        return wall, dict(seconds)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Calls:
    """Calls of a transformer and the rows that it saw in them, by what `now` says they are for.

    Rows are those of `hidden_states`: with classifier-free guidance two for each sample.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.now = ""
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self.calls[self.now] += 1
        self.rows[self.now] += len(named["hidden_states"])

    def take(self) -> dict[str, dict[str, int]]:
        """What was counted since the last time."""
        counted = {"calls": dict(self.calls), "rows": dict(self.rows)}
        self.calls.clear()
        self.rows.clear()
        return counted

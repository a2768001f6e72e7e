"""The most memory that each phase of a run takes of a GPU, as torch's allocator counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PeakMemory:
    """Bytes of this process on its GPU; on a CPU nothing is counted and nothing is asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = device.type == "cuda"
        self._phases: dict[str, int] = {}
        self._reserved = 0
        if self._counts:
            torch.cuda.init()  # which the first question takes for granted

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block as a phase: the most that is allocated at a time inside it."""
        if not self._counts:
            yield
            return
        self._reserved = self.reserved
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            peak = torch.cuda.max_memory_allocated(self._device)
            self._phases[name] = max(self._phases.get(name, 0), peak)

    @property
    def reserved(self) -> int:
        """The most that the allocator has held at a time since the start."""
        if not self._counts:
            return 0
        return max(self._reserved, torch.cuda.max_memory_reserved(self._device))

    def take(self) -> dict[str, int]:
        """The peak of each phase since the last call, and forget them."""
        taken, self._phases = self._phases, {}
        return taken

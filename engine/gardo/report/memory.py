"""The most memory that a run takes: of a GPU by phase, or of a host, by what the system counts."""

from __future__ import annotations

import resource

import torch


class PeakMemory:
    """Bytes of this process on its GPU; on a CPU phases have none, and the process's own counts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = device.type == "cuda"
        self._phases: dict[str, int] = {}
        self._reserved = 0
        if self._counts:
            torch.cuda.init()  # which the first question takes for granted

    def note(self, phase: str) -> None:
        """The most that was allocated since the last call of this or of `forget` is the phase's."""
        if not self._counts:
            return
        peak = torch.cuda.max_memory_allocated(self._device)
        self._phases[phase] = max(self._phases.get(phase, 0), peak)
        self.forget()

    def forget(self) -> None:
        """What was allocated until now is no phase's."""
        if self._counts:
            self._reserved = self.reserved
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def reserved(self) -> int:
        """The most that the allocator, or on a CPU the process, has held at a time since the start.

        Of a process that is what lies in memory of it, files that it reads there too.
        """
        if not self._counts:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(self._reserved, torch.cuda.max_memory_reserved(self._device))

    def take(self) -> dict[str, int]:
        """The peak of each phase since the last call, and forget them."""
        taken, self._phases = self._phases, {}
        return taken

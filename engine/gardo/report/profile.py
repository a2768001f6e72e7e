"""A trace of one training step, by torch.profiler: what ran when, on the host and on the GPU.

`trace.json.gz` opens in Perfetto (ui.perfetto.dev) or chrome://tracing; the run's phases are ranges
in it. `operators.txt` has the operators that took longest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

TRACE, OPERATORS = "trace.json.gz", "operators.txt"
SKIPPED = 2  # steps, at most: in the first of a run libraries warm up, the next warms the profiler


class StepProfile:
    """Records one of the `left` training steps of this process, and writes it into the folder."""

    def __init__(self, folder: Path, device: torch.device, *, left: int) -> None:
        self.folder = folder
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        skipped = min(SKIPPED, left - 1)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=max(0, skipped - 1), warmup=min(1, skipped), active=1, repeat=1),
            on_trace_ready=self._write,
        )
        self._order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self._profile.start()

    def step(self) -> None:
        """A training step has ended."""
        self._profile.step()

    def close(self) -> None:
        self._profile.stop()

    def _write(self, recorded: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / TRACE))
        table = recorded.key_averages().table(sort_by=self._order, row_limit=60)
        (self.folder / OPERATORS).write_text(table, encoding="utf-8")

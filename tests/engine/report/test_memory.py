"""Peaks of phases, from an allocator that is not there: its numbers are the test's."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from gardo.phases import _memory
from gardo.report.memory import PeakMemory
from gardo.report.phase_clock import PhaseClock
from gardo.report.progress import Progress


class Allocator:
    """What torch.cuda says of a GPU: bytes now, and the most since the peaks were reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = self.reserved = self.reserved_peak = 0
        self.started = False
        replaced = {
            "init": self._init,
            "reset_peak_memory_stats": self._reset,
            "max_memory_allocated": lambda device: self.peak,
            "max_memory_reserved": lambda device: self.reserved_peak,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def _init(self) -> None:
        self.started = True

    def _reset(self, device: torch.device) -> None:
        assert self.started
        self.peak, self.reserved_peak = self.allocated, self.reserved

    def take(self, count: int, *, keep: int = 0) -> None:
        """Allocates so many bytes more, and frees all but `keep` of them."""
        self.peak = max(self.peak, self.allocated + count)
        self.reserved = max(self.reserved, self.allocated + count)
        self.reserved_peak = max(self.reserved_peak, self.reserved)
        self.allocated += keep

    def give_back(self) -> None:
        self.reserved = self.allocated


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


@pytest.fixture
def progress(allocator: Allocator) -> Progress:
    phases = PhaseClock()
    phases.memory = PeakMemory(torch.device("cuda", 0))
    return Progress(10, console=Console(file=io.StringIO()), phases=phases)


def test_a_phase_has_its_own_peak(progress: Progress, allocator: Allocator) -> None:
    with progress.phase("load"):
        allocator.take(100, keep=40)
    with progress.phase("sample"):
        allocator.take(20)
    with progress.phase("save"):
        allocator.take(5)
    with progress.phase("save"):
        allocator.take(1)
    assert progress.phases.memory.take() == {"load": 100, "sample": 60, "save": 45}
    assert progress.phases.memory.take() == {}


def test_what_the_allocator_held_is_counted_since_the_start(
    progress: Progress, allocator: Allocator
) -> None:
    with progress.phase("sample"):
        allocator.take(100)
    allocator.take(300)  # between phases
    allocator.give_back()
    with progress.phase("train"):
        allocator.take(7)
    assert progress.phases.memory.reserved == 300


def test_a_record_has_the_fullest_rank(progress: Progress, allocator: Allocator) -> None:
    with progress.phase("sample"):
        allocator.take(20)
    with progress.phase("train"):
        allocator.take(60)
    engine = SimpleNamespace(agree_max=lambda mine: max(mine, 50))  # another rank's answer
    session: Any = SimpleNamespace(progress=progress, engine=engine)
    assert _memory(session) == {"memory": {"sample": 50, "train": 60}}
    assert _memory(session) == {}


def test_an_inner_phase_has_its_own_peak(progress: Progress, allocator: Allocator) -> None:
    with progress.phase("sample"):
        allocator.take(50)
        with progress.phase("decode"):
            allocator.take(90)
        allocator.take(20)
    assert progress.phases.memory.take() == {"sample": 50, "decode": 90}


def test_on_a_cpu_no_gpu_is_asked_and_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init", "reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.delattr(torch.cuda, name)
    progress = Progress(10, enabled=False)
    before = progress.phases.memory.reserved
    with progress.phase("sample"):
        torch.ones(before // 4 + (64 << 20) // 4)  # fp32: 64 MiB more than was ever there
    assert progress.phases.memory.reserved - before > 60 << 20
    assert progress.phases.memory.take() == {}

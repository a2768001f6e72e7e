"""The stopwatch: nested phases have their own time, and all add up to the wall clock."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gardo.report.phase_clock import PhaseClock, Spent
from tests.engine.report.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def phases(clock: Clock) -> PhaseClock:
    return PhaseClock(clock=clock)


def test_a_phase_has_what_is_not_an_inner_ones(phases: PhaseClock, clock: Clock) -> None:
    start = clock.now
    for _ in range(2):
        clock.now += 0.5
        with phases.phase("sample"):
            clock.now += 3
            with phases.phase("decode"):
                clock.now += 2
            clock.now += 1
    taken = phases.take()
    assert {name: spent.seconds for name, spent in taken.items()} == {
        "sample": 8.0,
        "decode": 4.0,
        "other": 1.0,
    }
    assert sum(spent.seconds for spent in taken.values()) == clock.now - start


def test_an_error_ends_its_phases(phases: PhaseClock, clock: Clock) -> None:
    with pytest.raises(KeyError), phases.phase("train"), phases.phase("optimizer"):
        clock.now += 1
        raise KeyError
    assert phases.running == "other"
    clock.now += 2
    seconds = {name: spent.seconds for name, spent in phases.take().items()}
    assert seconds == {"train": 0.0, "optimizer": 1.0, "other": 2.0}


def test_what_is_taken_is_gone_and_a_running_phase_goes_on(
    phases: PhaseClock, clock: Clock
) -> None:
    with phases.phase("train"):
        clock.now += 1
        assert phases.take()["train"].seconds == 1.0
        clock.now += 2
    taken = phases.take()
    assert taken == {"train": Spent(2.0), "other": Spent(0.0)}
    assert phases.take() == {"other": Spent()}


def test_calls_and_rows_belong_to_the_phase_that_runs(phases: PhaseClock) -> None:
    model = nn.Linear(4, 2)
    phases.watch(model)
    with phases.phase("sample"):
        model(torch.zeros(3, 4))
        model(input=torch.zeros(2, 4))
        with phases.phase("decode", rows=5):
            pass
    with phases.phase("train"):
        model(torch.zeros(7, 4))
    with phases.phase("optimizer"):
        pass
    counts = {name: (spent.calls, spent.rows) for name, spent in phases.take().items()}
    assert counts == {
        "sample": (2, 5),
        "decode": (1, 5),
        "train": (1, 7),
        "optimizer": (0, 0),
        "other": (0, 0),
    }


def test_phases_are_ranges_of_the_profiler(phases: PhaseClock) -> None:
    with torch.profiler.profile() as profile, phases.phase("sample"):
        torch.zeros(3).add(1)
    assert "sample" in {event.name for event in profile.events() or []}


@pytest.mark.gpu
def test_on_a_gpu_seconds_are_those_of_its_stream() -> None:
    phases = PhaseClock(torch.device("cuda", 0))
    with phases.phase("sample"):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds, and the host is far ahead
    taken = phases.take()
    assert taken["sample"].seconds > 0.01 > taken["other"].seconds

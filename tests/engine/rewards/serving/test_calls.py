"""Deadline, retries, pauses and the breaker, with a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gardo.rewards.serving.calls import Breaker, Caller, CallFailed, CallSettings, Transient


class Clock:
    """Time that passes where somebody sleeps or works."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def calling(clock: Clock, *, draw: float = 1.0, **settings) -> Caller:
    chosen = CallSettings(**settings)
    breaker = Breaker(chosen.breaker, chosen.cooldown, clock)
    return Caller(chosen, breaker, clock.sleep, clock, lambda: draw)


def failing(clock: Clock, times: int, takes: float = 0.0, after: float | None = None):
    """An attempt that fails so many times, then says what its limit was."""
    left = [times]

    def attempt(seconds: float) -> float:
        clock.now += takes
        if left[0]:
            left[0] -= 1
            raise Transient("down", after=after)
        return seconds

    return attempt


def test_a_call_that_works_is_made_once():
    clock = Clock()
    assert calling(clock)(failing(clock, 0)) == 60 and not clock.pauses


def test_pauses_double_up_to_the_longest():
    clock = Clock()
    calling(clock, first_pause=1.0, longest_pause=5.0)(failing(clock, 5))
    assert clock.pauses == [1, 2, 4, 5, 5]


def test_pauses_are_cut_at_random_by_up_to_half():
    clock = Clock()
    calling(clock, draw=0.0, first_pause=1.0)(failing(clock, 2))
    assert clock.pauses == [0.5, 1.0]


def test_a_server_may_ask_for_a_longer_pause():
    clock = Clock()
    calling(clock, first_pause=1.0)(failing(clock, 2, after=7.0))
    assert clock.pauses == [7, 7]


def test_after_the_last_retry_the_reason_is_said():
    clock = Clock()
    with pytest.raises(CallFailed, match=r"down \(3 tries in 1.5 s\)"):
        calling(clock, retries=2)(failing(clock, 9))


def test_the_deadline_ends_a_call_however_many_retries_are_left():
    clock = Clock()
    with pytest.raises(CallFailed, match="down"):
        calling(clock, deadline=10.0, retries=100)(failing(clock, 999, takes=3.0))
    assert clock.now <= 13  # the try that began before the deadline may end after it


def test_a_try_has_no_more_time_than_the_deadline_leaves():
    clock = Clock()
    said = calling(clock, deadline=10.0, attempt=8.0, first_pause=1.0)(failing(clock, 1, takes=4.0))
    assert said == 5.0  # of 10 s: 4 for the first try, 1 of pause


def test_other_errors_are_not_tried_again():
    clock = Clock()

    def wrong(seconds: float) -> None:
        raise CallFailed("422")

    with pytest.raises(CallFailed, match="422"):
        calling(clock)(wrong)
    assert not clock.pauses


def test_the_breaker_leaves_a_server_alone_then_lets_one_try():
    clock = Clock()
    caller = calling(clock, retries=0, breaker=2, cooldown=30.0)
    for _ in range(2):
        with pytest.raises(CallFailed, match="down"):
            caller(failing(clock, 1))
    with pytest.raises(CallFailed, match="left alone for 30 s more after: down"):
        caller(failing(clock, 0))
    clock.now += 31
    with pytest.raises(CallFailed, match="down"):
        caller(failing(clock, 1))  # the trial fails: open again
    with pytest.raises(CallFailed, match="left alone"):
        caller(failing(clock, 0))
    clock.now += 31
    assert caller(failing(clock, 0)) == 60
    assert caller(failing(clock, 0)) == 60  # closed


def test_one_caller_tries_when_the_time_is_up_however_long_it_takes():
    clock = Clock()
    breaker = Breaker(1, 10.0, clock)
    breaker.failed("down")
    clock.now = 11
    assert breaker.check()
    clock.now = 99
    breaker.failed("down")  # a call that began before
    clock.now = 200
    with pytest.raises(CallFailed, match="left alone while one call tries, after: down"):
        breaker.check()
    breaker.failed("down", trial=True)
    clock.now = 211
    assert breaker.check()


def calls(caller: Caller, error: Exception) -> None:
    def attempt(seconds: float) -> None:
        raise error

    with pytest.raises(type(error) if isinstance(error, ValueError) else CallFailed):
        caller(attempt)


@pytest.mark.parametrize("error", [CallFailed("500"), Transient("503"), ValueError("a bug")])
def test_what_is_no_answer_of_a_working_server_opens_the_breaker(error):
    caller = calling(Clock(), retries=0, breaker=2)
    for _ in range(2):
        calls(caller, error)
    with pytest.raises(CallFailed, match=f"left alone for 30 s more after: {error}"):
        caller(lambda seconds: None)


@pytest.mark.parametrize(
    "error", [CallFailed("422", answered=True), Transient("429", answered=True)]
)
def test_a_server_that_refuses_or_is_busy_works(error):
    caller = calling(Clock(), retries=0, breaker=2)
    for _ in range(9):
        calls(caller, CallFailed("500"))
        calls(caller, error)
    assert caller(lambda seconds: seconds) == 60


def test_a_trial_that_ends_with_an_error_of_its_own_lets_another_try():
    clock = Clock()
    caller = calling(clock, breaker=1)
    for _ in range(3):
        calls(caller, ValueError("a bug"))
        clock.now += 31
    assert caller(lambda seconds: seconds) == 60


@given(st.floats(1, 100), st.integers(0, 20), st.floats(0.01, 5), st.floats(0, 10), st.floats(0, 1))
def test_no_call_takes_more_than_its_deadline_and_one_try(deadline, retries, first, takes, draw):
    clock = Clock()
    caller = calling(clock, draw=draw, deadline=deadline, retries=retries, first_pause=first)
    with pytest.raises(CallFailed):
        caller(failing(clock, 10_000, takes=takes))
    assert clock.now <= deadline + takes
    assert len(clock.pauses) <= retries

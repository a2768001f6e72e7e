"""The screen: phases add up, lines say what was measured, a terminal is left as it was."""

import io
import math
from collections.abc import Iterator

import pytest
from rich.console import Console

from gardo.report.phase_clock import PhaseClock
from gardo.report.progress import Progress, format_duration, format_interval, format_number
from tests.engine.report.clock import Clock
from tests.engine.report.records import evaluation_record, step_record


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def text() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def progress(clock: Clock, text: io.StringIO) -> Iterator[Progress]:
    """Of 500 steps, on `text`, which is no terminal."""
    console = Console(file=text, width=80, force_terminal=False)
    with Progress(500, console=console, phases=PhaseClock(clock=clock)) as progress:
        yield progress


def test_phases_are_timed_and_add_up(progress: Progress, clock: Clock) -> None:
    for seconds in (2.0, 3.0):
        with progress.phase("sample"):
            clock.now += seconds
        clock.now += 10  # between phases
    taken = {name: spent.seconds for name, spent in progress.take().items()}
    assert taken == {"sample": 5.0, "other": 20.0}


def test_plain_lines(progress: Progress, clock: Clock, text: io.StringIO) -> None:
    with progress.phase("load"):
        clock.now += 5000  # before the first step: no part of the time left
    progress.take()
    for step in (1, 2):
        with progress.phase("train"):
            clock.now += 60
        progress.step(step_record(step, events=["reference reset (kl)"] * (step == 2)))
    first = "step 1/500  sample 18.2s  reward 3.1s  train 24.0s"
    first += "  |  hpsv2 0.313  pickscore 22.41 (held out)"
    measures = "             kl 1.9e-4  ratio 1 +- 3e-5  clip 11 %  gate 0.4 %"
    measures += "  diversity 17.3  |  ETA "
    second = first.replace("1/500", "2/500").replace("0.313", "0.314")
    assert text.getvalue().splitlines() == [
        first,
        measures + "8h19m",
        second,
        measures + "8h18m",
        "             reference reset (kl)",
    ]


def test_evaluation_lines(progress: Progress, text: io.StringIO) -> None:
    progress.evaluation(evaluation_record(60, proxy=0.1))
    assert text.getvalue().splitlines() == [
        "evaluation at step 60  288 images  36 prompts  4.1s",
        "             count 0.700 [0.690, 0.710]  change +0.100 [+0.090, +0.110]  (proxy)",
        "             quality 0.900 [0.890, 0.910]  change +0.000 [-0.010, +0.010]  (held out)",
        "             diversity  layout 2.40",
    ]


def test_a_sparse_or_broken_record_prints(progress: Progress, text: io.StringIO) -> None:
    progress.step({"kind": "step", "step": 1})
    progress.step({"kind": "step", "step": 2, "metrics": {"kl": math.nan, "unknown": 1.0}})
    progress.message("[bold]a bracket is not markup[/bold] :smile:")
    assert text.getvalue().splitlines() == [
        "step 1/500",
        "step 2/500",
        "             kl nan  |  ETA 0s",
        "[bold]a bracket is not markup[/bold] :smile:",
    ]


def test_a_reward_is_compared_with_the_last_steps_of_before(text: io.StringIO) -> None:
    console = Console(file=text, force_terminal=False, width=200)
    history = [step_record(step) for step in range(1, 41)]
    with Progress(99, console=console, history=history) as progress:
        progress.step(step_record(50))  # 0.312 + step / 1000; steps 21 to 40: 0.3425 ± 0.0059
        assert "hpsv2 0.362 (+0.020 ± 0.006)" in text.getvalue()
        progress.step(step_record(51))
        assert "hpsv2 0.363 (+0.019 ± 0.007)" in text.getvalue(), "the oldest is left out"


def test_a_step_that_has_no_value_is_no_part_of_the_last(text: io.StringIO) -> None:
    console = Console(file=text, force_terminal=False, width=200)
    broken = step_record(2)
    broken["rewards"]["hpsv2"]["mean"] = math.nan
    with Progress(9, console=console, history=[step_record(1), broken]) as progress:
        progress.step(step_record(3))  # two finite values are no spread yet
        progress.step(step_record(4))
        progress.step(step_record(5))
    lines = [line for line in text.getvalue().splitlines() if "hpsv2" in line]
    assert ["±" in line.split("pickscore")[0] for line in lines] == [False, False, True]


def test_disabled_measures_and_is_silent(clock: Clock, text: io.StringIO) -> None:
    with Progress(
        5, enabled=False, console=Console(file=text), phases=PhaseClock(clock=clock)
    ) as progress:
        with progress.phase("sample"):
            clock.now += 2
        progress.step(step_record(1))
        progress.evaluation(evaluation_record(0))
        progress.message("hello")
    assert progress.take()["sample"].seconds == 2.0 and text.getvalue() == ""


def test_terminal_has_a_live_line_and_gives_the_cursor_back(text: io.StringIO) -> None:
    console = Console(file=text, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Progress(5, console=console) as progress:
        with progress.phase("running"):  # a name that no finished line has
            progress.message("a message scrolls above the live line")
        progress.step(step_record(1))
    assert "running 0s" in text.getvalue() and "step 1/5  sample 18.2s" in text.getvalue()
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")


def test_formats() -> None:
    numbers = [0.66666, 22.412, 1.94e-4, 0.0, 12345.6, 0.99999, -3e-5, 2e9, math.nan]
    assert [format_number(value, 3) for value in numbers] == [
        "0.667", "22.4", "1.94e-4", "0", "12346", "1.00", "-3e-5", "2e9", "nan",
    ]  # fmt: skip
    assert format_number(None) == "-"
    assert format_interval({"mean": 0.6666, "low": 0.61, "high": 0.72}) == "0.667 [0.610, 0.720]"
    assert (
        format_interval({"mean": 0.5, "low": math.nan, "high": math.nan}, signed=True) == "+0.5000"
    )
    durations = [4.4, 59.7, 723, 21132, 100000, math.nan]
    assert [format_duration(value) for value in durations] == [
        "4s", "1m00s", "12m03s", "5h52m", "1d03h", "?",
    ]  # fmt: skip

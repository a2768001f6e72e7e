"""What a run prints while it is going.

On a terminal a live line shows the phase now running, the step and the time left, and finished
steps scroll above it. Into a pipe or a file only the finished steps are printed:

    step 41/500  sample 18.2s  reward 3.1s  train 24.0s  |  hpsv2 0.312 (+0.004 ± 0.006)
                 kl 1.9e-4  ratio 1 +- 3e-5  clip 11 %  diversity 17.3  |  ETA 5h52m

In brackets: how far the value is from the mean of the last 20 steps, and the standard deviation of
these. Every step has other prompts, so that one step alone says little.

A standard output that takes nothing more, a closed terminal or a full disk, never ends a run.
"""

import errno
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, stdev
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gardo.report.metrics_log import Record
from gardo.report.phase_clock import PhaseClock, Spent

_INDENT = " " * 13
_RECENT = 20  # steps that a reward is compared with
_FEW = 3  # of them say nothing of a spread
_ETA_STEPS = 20  # steps whose mean duration, evaluations included, gives the time left
_HELD_OUT = " (held out)"
_SHOWN = 0.01  # of a step's seconds: phases that took less are in the log and in the report


_GONE = {errno.EPIPE, errno.EIO, errno.EBADF}  # nobody will ever read this


class _Console(Console):
    """Rich's, which would end the process when its reader has gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads this")


class Progress:
    """Measures phases and prints finished steps and evaluations; a context manager.

    Args:
        total_steps: of the whole run, those done before a resume included.
        enabled: False (ranks other than the first) measures and prints nothing.
        console: where to print; standard output by default.
        history: records of an earlier part of this run.
        phases: the stopwatch.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        enabled: bool = True,
        console: Console | None = None,
        history: Sequence[Record] = (),
        phases: PhaseClock | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.enabled = enabled
        self.console = console or _Console()
        self.phases = phases or PhaseClock()
        self._clock = self.phases.clock
        self._phase: tuple[str, float] | None = None
        self._finished: deque[float] = deque(maxlen=_ETA_STEPS + 1)
        self._taken = True  # nothing was measured since
        self._live: Live | None = None
        earlier = [record for record in history if record["kind"] == "step"]
        self._recent: dict[str, deque[float]] = {}
        for record in earlier[-_RECENT:]:
            self._remember(record)
        self._step = earlier[-1]["step"] if earlier else 0

    @contextmanager
    def phase(self, name: str, *, rows: int = 0) -> Iterator[None]:
        """Measure the block as a phase (phase_clock.py), and show it."""
        if self.phases.is_beside:
            with self.phases.phase(name, rows=rows):
                yield
            return
        started = self._clock()
        if len(self._finished) < 2 and self._taken:
            self._finished = deque([started], maxlen=_ETA_STEPS + 1)  # loading is not a step
        self._taken = False
        outer, self._phase = self._phase, (name, started)
        self._show()
        try:
            with self.phases.phase(name, rows=rows):
                yield
        finally:
            self._phase = outer

    def take(self) -> dict[str, Spent]:
        """What each phase has spent since the last call."""
        self._taken = True
        return self.phases.take()

    def step(self, record: Record) -> None:
        """Print a finished training step."""
        self._finished.append(self._clock())
        self._step = record["step"]
        self._print(_step_lines(record, self._recent, self.total_steps, self._time_left()))
        self._remember(record)

    def _remember(self, record: Record) -> None:
        for name, mean in _means(record).items():
            if math.isfinite(mean):
                self._recent.setdefault(name, deque(maxlen=_RECENT)).append(mean)

    def resumed(self, step: int) -> None:
        """The run goes on after `step`, even if its log got further."""
        self._step = step

    def evaluation(self, record: Record) -> None:
        """Print an evaluation: rewards with their intervals and changes, diversity."""
        self._print(_evaluation_lines(record))

    def message(self, text: str) -> None:
        """Print a line of text as it is."""
        self._print(text)

    def close(self) -> None:
        """Take the live line away and give the cursor back. A second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _time_left(self) -> float:
        """Seconds until the last step is done, NaN before the first."""
        if len(self._finished) < 2:
            return math.nan
        each = (self._finished[-1] - self._finished[0]) / (len(self._finished) - 1)
        return each * max(self.total_steps - self._step, 0)

    def _print(self, text: str) -> None:
        if not self.enabled:
            return
        try:
            self.console.print(Text(text), soft_wrap=True)
            self.console.file.flush()
        except OSError as error:
            if error.errno in _GONE:
                self._speak_to_nobody()

    def _speak_to_nobody(self) -> None:
        """For what else prints, and for Python's own flush at the end, which would fail too."""
        self.enabled = False
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, self.console.file.fileno())
        os.close(nobody)
        self.close()

    def _show(self) -> None:
        """Start the live line, on a terminal that can redraw one."""
        console = self.console
        if not self.enabled or self._live or not console.is_terminal or console.is_dumb_terminal:
            return
        self._live = Live(
            get_renderable=self._live_line, console=console, refresh_per_second=4, transient=True
        )
        self._live.start()

    def _live_line(self) -> Table:
        running = ""
        if phase := self._phase:  # read once: the display's thread calls this
            running = f"{phase[0]} {self._clock() - phase[1]:.0f}s"
        left = self._time_left()
        line = Table.grid(padding=(0, 2))
        line.add_row(
            Text(f"step {min(self._step + 1, self.total_steps)}/{self.total_steps}"),
            ProgressBar(total=self.total_steps, completed=self._step, width=24),
            Text(f"{running:<16}"),
            Text("" if math.isnan(left) else f"ETA {format_duration(left)}"),
        )
        return line


def format_number(value: float | None, digits: int = 4) -> str:
    """A number in `digits` significant digits: 0.6667, 22.41, 1.9e-4; `-` for None."""
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if not -3 <= int(exponent) < 6:
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{max(0, digits - 1 - int(exponent))}f}"


def format_interval(interval: Mapping[str, Any], *, signed: bool = False) -> str:
    """`0.667 [0.612, 0.722]`: two significant digits of the half width.

    Without finite ends (one prompt) the mean alone.
    """
    mean, low, high = (interval.get(key) for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None or not math.isfinite(mean + low + high):
        sign = "+" if signed and mean is not None and mean > 0 else ""
        return sign + format_number(mean)
    half_width = (high - low) / 2 or abs(mean) * 0.1 or 1.0
    decimals = min(8, max(0, 1 - math.floor(math.log10(half_width) + 1e-9)))
    style = f"{'+' if signed else ''}.{decimals}f"
    return f"{mean:{style}} [{low:{style}}, {high:{style}}]"


def format_share(value: float) -> str:
    """A share of one in per cent: `11 %`, `0.4 %`."""
    percent = 100 * value
    return f"{percent:.0f} %" if abs(percent) >= 10 or percent == 0 else f"{percent:.2g} %"


def format_duration(seconds: float) -> str:
    """`45s`, `12m03s`, `5h52m`, `3d04h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for limit, small, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= limit:
            return f"{whole // limit}{names[0]}{whole % limit // small:02d}{names[1]}"
    return f"{whole}s"


def _means(record: Record) -> dict[str, float]:
    return {name: reward["mean"] for name, reward in record.get("rewards", {}).items()}


def _step_lines(
    record: Record, recent: Mapping[str, Sequence[float]], total: int, left: float
) -> str:
    """The two lines of a step, and one for each of its events."""
    spent = record.get("seconds", {})
    shown = _SHOWN * sum(spent.values())
    seconds = [f"{name} {value:.1f}s" for name, value in spent.items() if value >= shown]
    rewards = []
    for name, reward in record.get("rewards", {}).items():
        if reward.get("role") == "auxiliary":
            continue
        mean = reward["mean"]
        before, change = recent.get(name, ()), ""
        if len(before) >= _FEW:
            away, spread = mean - fmean(before), stdev(before)
            change = f" ({_rounded(away, mean, '+')} ± {_rounded(spread, mean)})"
        held_out = _HELD_OUT if reward.get("role") == "held_out" else ""
        rewards.append(f"{name} {_rounded(mean, mean)}{change}{held_out}")
    head = "  ".join([f"step {record['step']}/{total}", *seconds])
    lines = ["  |  ".join([head, "  ".join(rewards)]) if rewards else head]
    tail = [] if math.isnan(left) else [f"ETA {format_duration(left)}"]
    if "images_per_second" in record:
        tail.insert(0, f"{format_number(record['images_per_second'], 3)} images/s")
    if measures := _measures(record.get("metrics", {})):
        tail.insert(0, "  ".join(measures))
    if tail:
        lines.append(_INDENT + "  |  ".join(tail))
    lines += [_INDENT + str(event) for event in record.get("events", ())]
    return "\n".join(lines)


def _measures(metrics: Mapping[str, float]) -> list[str]:
    """The metrics worth a glance at every step; the others are in the log and in the report."""
    parts = []
    if "kl" in metrics:
        parts.append(f"kl {format_number(metrics['kl'], 2)}")
    if "ratio" in metrics:
        error = (
            f" +- {format_number(metrics['ratio_error'], 1)}" if "ratio_error" in metrics else ""
        )
        parts.append(f"ratio {metrics['ratio']:.6g}{error}")
    for label, name in (("clip", "clip_fraction"), ("gate", "gate_share")):
        if name in metrics:
            parts.append(f"{label} {format_share(metrics[name])}")
    if "diversity" in metrics:
        parts.append(f"diversity {format_number(metrics['diversity'], 3)}")
    return parts


def _evaluation_lines(record: Record) -> str:
    facts = [f"evaluation at step {record['step']}"]
    for key, noun in (("image_count", "images"), ("prompt_count", "prompts")):
        if key in record:
            facts.append(f"{record[key]} {noun}")
    if "seconds" in record:
        facts.append(f"{record['seconds']:.1f}s")
    lines = ["  ".join(facts)]
    changes = record.get("change", {})
    for name, reward in record.get("rewards", {}).items():
        line = f"{name} {format_interval(reward)}"
        if name in changes and record["step"]:
            line += f"  change {format_interval(changes[name], signed=True)}"
        role = str(reward.get("role", "")).replace("_", " ")
        lines.append(_INDENT + line + (f"  ({role})" if role else ""))
    if diversity := record.get("diversity"):
        values = "  ".join(f"{name} {format_number(value, 3)}" for name, value in diversity.items())
        lines.append(_INDENT + "diversity  " + values)
    lines += [_INDENT + str(event) for event in record.get("events", ())]
    return "\n".join(lines)


def _rounded(value: float, scale: float, sign: str = "") -> str:
    """A value with the decimals that suit numbers as large as `scale`: 0.312, 22.41; +0.004."""
    if not math.isfinite(scale) or not 1e-2 <= abs(scale) < 1e6:
        return f"{value:{sign}.3g}"
    decimals = min(3, max(0, 3 - math.floor(math.log10(abs(scale)))))
    return f"{value:{sign}.{decimals}f}"

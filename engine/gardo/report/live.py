"""The report of a run that goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gardo.report.html import write_report

EVERY = 60.0  # seconds between two reports, at least
SHARE = 0.02  # of a run's time that its reports take, at most


class LiveReport:
    """Writes `report.html` of a run's folder, seldom enough to cost nothing.

    What keeps it from being written, a full disk, ends no run: the end of the run says so.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._due, self._written = clock() + EVERY, False

    def write(self) -> None:
        """Another one, if it is time for it."""
        began = self._clock()
        if began >= self._due:
            self._write(live=True)
            ended = self._clock()
            self._due = ended + max(EVERY, (ended - began) / SHARE)

    def close(self) -> None:
        """The run is over, or cut: a page that is there waits for nothing more."""
        if self._written:
            self._write(live=False)

    def _write(self, *, live: bool) -> None:
        with suppress(OSError, ValueError):
            write_report(self._folder, live=live)
            self._written = True

"""How the processes of a run end: when they are asked to, with their launcher, when one hangs.

| asked by | what happens |
|---|---|
| SIGTERM, SIGINT, SIGHUP to any rank | all ranks leave at the next place where they agree to |
| the same again, a second later | the rank ends at once |
| the launcher's death | the kernel kills the rank |
| no progress for `run.watchdog` seconds | the rank writes where it stands, and ends |
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Protocol, Self

import psutil

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPEATED = 1.0  # seconds; launchers send twice what they were sent once
HUNG = 124  # the exit code of a rank that the watchdog ended, as of `timeout`
STDERR = 2
STARTED_HERE = "GARDO_STARTED"  # set where `gardo train` has started the launcher, or the rank
_PR_SET_PDEATHSIG = 1


def hear_signals() -> None:
    """Gives signals of ASKING that are ignored, under nohup or in a script's background, what they
    do by default: for a program whose children are to be sent some."""
    for number in ASKING:
        if signal.getsignal(number) is signal.SIG_IGN:
            interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)


class Stopped(Exception):
    """All ranks leave, at the same place, because one of them was sent this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Inside, a signal that asks this process to end sets `asked` to its number, and no more.

    The same or another of them a second later ends the process with 128 + its number, even if it
    hangs in a collective: a thread sees to that. So does the first, where another rank of this
    launcher has ended, which is then why it comes. Signals that are ignored (nohup) stay so.
    """

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> Self:
        self._ranks = len(ranks_of(os.getppid()))
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._earlier_pipe = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._earlier = {
            number: signal.signal(number, lambda *_: None)  # the thread acts, not the handler
            for number in ASKING
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        threading.Thread(target=self._listen, name="stop", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier_pipe)
        os.close(self._write)  # ends the thread

    def _listen(self) -> None:
        first = float("-inf")
        while number := int.from_bytes(os.read(self._read, 1)):
            if number not in ASKING:
                continue
            if not self.asked and len(ranks_of(os.getppid())) == self._ranks:
                self.asked, first = number, time.monotonic()
            elif time.monotonic() - first > REPEATED:
                leave_at_once(128 + number)
        os.close(self._read)


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The ranks that this process of DeepSpeed's has started and that run; of another one none."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(launcher).children():
            with suppress(psutil.Error):
                if any(part.startswith("--local_rank=") for part in child.cmdline()):
                    found.append(child)
    return found


class Clock(Protocol):
    """report/phase_clock.py, as far as the watchdog reads it."""

    moves: int

    @property
    def running(self) -> str: ...


class Watchdog:
    """Inside, the process ends with HUNG where nothing moves on `clock` for `limit` seconds; 0:
    never.

    Before, the stacks of all threads go to standard error and to `file`. Should a thread keep
    Python's lock for as long, faulthandler's own thread does the same without the phase.
    """

    def __init__(self, clock: Clock, limit: float, file: Path, rank: int) -> None:
        self._clock, self._limit, self._file, self._rank = clock, limit, file, rank
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()  # which may just be about to have faulthandler wait
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        if not self._limit:
            return
        seen, since = self._clock.moves, time.monotonic()
        every = min(self._limit / 10, 10.0)
        while not self._ended.wait(every):
            faulthandler.dump_traceback_later(self._limit + 2 * every, exit=True, file=STDERR)
            if self._clock.moves != seen:
                seen, since = self._clock.moves, time.monotonic()
            elif time.monotonic() - since > self._limit:
                self._bark()

    def _bark(self) -> NoReturn:
        line = (
            f"rank {self._rank}: no progress in phase {self._clock.running!r} for "
            f"{self._limit:g} s (run.watchdog); where its threads stand:\n"
        )
        _write_stacks(STDERR, line)
        with suppress(OSError), open(self._file, "wb") as file:
            _write_stacks(file.fileno(), line)
        time.sleep(self._limit / 20)  # for others to do the same: its end is theirs
        leave_at_once(HUNG)


def _write_stacks(descriptor: int, line: str) -> None:
    os.write(descriptor, line.encode())
    faulthandler.dump_traceback(descriptor, all_threads=True)


def dying_with(parent: int) -> Callable[[], None]:
    """What has the kernel kill the process that calls it when its parent, which must have this
    number, ends. It looks nothing up: it may be called between a fork and what is started."""
    prctl = ctypes.CDLL(None).prctl

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(128 + signal.SIGKILL)

    return bind


def die_with_launcher() -> None:
    """Has the kernel kill this rank when its launcher ends, which leads a session where `gardo
    train` has started it. Else nothing tells whether the present parent is the launcher still."""
    parent = os.getppid()
    if STARTED_HERE in os.environ and os.getsid(0) != os.getpid():
        parent = os.getsid(0)
    dying_with(parent)()


def leave_at_once(code: int) -> NoReturn:
    """Ends the process from any thread, whatever the others are at."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def leave(code: int) -> NoReturn:
    """Ends a process that has done its work: what Python does at an end, without taking modules
    apart.

    Threads of torch and gloo may still be alive then, and one that wants Python's lock back is
    unwound through C++ that aborts: "terminate called without an active exception".
    """
    logging.shutdown()
    atexit._run_exitfuncs()
    leave_at_once(code)

"""Servers that a run starts for itself: a process on each machine for each worker of its recipe.

The first rank of a machine starts them, before anything else loads, and all ranks of the machine
ask them over the loopback, with a token that only they know. A worker ends with the process that
started it, however that ends: it reads its standard input, which closes then. One that dies is
started again at the same place, a few times.

The worker's own side is gardo/reward_worker.py.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pydantic import Field

import gardo
import gardo_kernels
from gardo.rewards.serving.line import Address
from gardo.settings import VISIBLE, VISIBLE_AT_FIRST, Strict

RESTARTS = 3
HOST = "127.0.0.1"


class WorkerSettings(Strict):
    """A process for rewards, one on each machine."""

    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, or a GPU such as cuda:7"
    )
    python: str | None = Field(
        None, description="another Python, in which torch and what the rewards need is installed"
    )
    threads: int | None = Field(None, ge=1, description="of torch on a CPU")
    start_seconds: float = Field(600, gt=0, description="until its rewards are loaded")


class Worker:
    """The process, as its starter sees it."""

    def __init__(
        self,
        name: str,
        settings: WorkerSettings,
        rewards: Mapping[str, Mapping[str, Any]],
        say: Callable[[str], object] = lambda text: None,
        *,
        bf16_reductions: bool = False,
    ) -> None:
        """Starts it with rewards (settings as JSON has them); it loads while others work.

        What keeps it from starting is said by `address`. `bf16_reductions` is the run's
        `bf16_reduced_precision_reduction`.
        """
        self.name, self.settings, self.say = name, settings, say
        self._port, self._closing, self._restarts = 0, threading.Event(), 0
        self._token = secrets.token_urlsafe(32)
        self._orders = {
            "rewards": dict(rewards),
            "device": settings.device,
            "threads": settings.threads,
            "bf16_reductions": bf16_reductions,
            "token": self._token,
        }
        self._started, self._starting = threading.Event(), threading.Lock()
        self._links = Links() if settings.python else None
        self.process: subprocess.Popen[str] | None = None
        self._problem = self._start()
        if self.process is None:
            self._started.set()
            return
        self._watch = threading.Thread(target=self._watched, name=f"watch-{name}", daemon=True)
        self._watch.start()

    def address(self) -> Address:
        """Where it listens, once its rewards are loaded. ValueError where they do not load."""
        in_time = self._started.wait(self.settings.start_seconds)
        if not in_time or not self._port:
            why = self._problem or f"not in {self.settings.start_seconds:g} s"
            if in_time and self.process:
                why = _code(self.process.wait())
            self.close()
            raise ValueError(
                f"scoring.workers.{self.name}: its rewards did not load ({why}); see above"
            )
        return Address(f"http://{HOST}:{self._port}", self._token)

    def close(self) -> None:
        with self._starting:
            self._closing.set()
        if self.process:
            with suppress(OSError):  # it is gone already
                _pipe(self.process.stdin).close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._links:
            self._links.close()

    def _start(self) -> str:
        """What keeps it from starting, if anything does."""
        python = self.settings.python or sys.executable
        try:
            self.process = subprocess.Popen(
                [python, "-m", "gardo.reward_worker"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, env=_environment(self._links),
            )  # fmt: skip
        except OSError as error:
            return f"{python}: {error.strerror}"
        with suppress(BrokenPipeError):  # it is gone already; who watches it says so
            orders = _pipe(self.process.stdin)
            orders.write(json.dumps({**self._orders, "port": self._port}) + "\n")
            orders.flush()
        return ""

    def _watched(self) -> None:
        """Reads the port; starts the process again when it dies."""
        while process := self.process:
            line = _pipe(process.stdout).readline()
            if line.startswith("port "):
                self._port = int(line.split()[1])
                self._started.set()
            code = process.wait()
            if self._closing.is_set():
                return
            if not self._port or self._restarts == RESTARTS:
                self._started.set()
                self.say(f"worker {self.name} ended ({_code(code)}) and is not started again")
                return
            self._restarts += 1
            self.say(f"worker {self.name} ended ({_code(code)}); started again")
            self._closing.wait(1)
            with self._starting:
                if self._closing.is_set():
                    return
                if problem := self._start():
                    self.say(f"worker {self.name} is not started again: {problem}")
                    return


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream
    return stream


def _code(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"exit code {code}"


class Links:
    """A folder with links to our packages and no other's, for another Python to import."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gardo-worker-"))
        for package in (gardo, gardo_kernels):
            (self.folder / package.__name__).symlink_to(package.__path__[0])

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _environment(links: Links | None) -> dict[str, str]:
    """This gardo is the one that the worker imports, in whichever Python; and it sees the GPUs that
    the run saw before it gave each rank its own."""
    here = {str(Path(module.__path__[0]).parent) for module in (gardo, gardo_kernels)}
    paths = [str(links.folder)] if links else sorted(here)
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    of_ranks = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    kept = {name: value for name, value in os.environ.items() if name not in of_ranks}
    if VISIBLE_AT_FIRST in kept:
        kept |= {VISIBLE: kept.pop(VISIBLE_AT_FIRST)}
        if not kept[VISIBLE]:
            del kept[VISIBLE]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}

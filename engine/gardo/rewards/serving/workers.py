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
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

import gardo
import gardo_kernels
from gardo.rewards.serving.client import Address
from gardo.settings import Strict

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
    ) -> None:
        """Starts it with rewards (settings as JSON has them); it loads while others work."""
        self.name, self.settings, self.rewards, self.say = name, settings, dict(rewards), say
        self._token = secrets.token_urlsafe(32)
        self._port, self._closing, self._restarts = 0, False, 0
        self._started = threading.Event()
        self.process = self._start()
        self._watch = threading.Thread(target=self._watched, name=f"watch-{name}", daemon=True)
        self._watch.start()

    def address(self) -> Address:
        """Where it listens, once its rewards are loaded. ValueError where they do not load."""
        if not self._started.wait(self.settings.start_seconds) or not self._port:
            self.close()
            raise ValueError(
                f"scoring.workers.{self.name}: its rewards did not load "
                f"({self._ended() or f'in {self.settings.start_seconds:g} s'}); see above"
            )
        return Address(f"http://{HOST}:{self._port}", self._token)

    def close(self) -> None:
        self._closing = True
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [self.settings.python or sys.executable, "-m", "gardo.reward_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(),
        )  # fmt: skip
        orders = {
            "rewards": self.rewards,
            "device": self.settings.device,
            "threads": self.settings.threads,
            "token": self._token,
            "port": self._port,
        }
        assert process.stdin
        try:
            process.stdin.write(json.dumps(orders) + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # it is gone already; who watches it says so
            pass
        return process

    def _watched(self) -> None:
        """Reads the port; starts the process again when it dies."""
        while True:
            process = self.process
            assert process.stdout
            line = process.stdout.readline()
            if line.startswith("port "):
                self._port = int(line.split()[1])
                self._started.set()
            code = process.wait()
            if self._closing:
                return
            if not self._port or self._restarts == RESTARTS:
                self._started.set()
                self.say(f"worker {self.name} ended ({_code(code)}) and is not started again")
                return
            self._restarts += 1
            self.say(f"worker {self.name} ended ({_code(code)}); started again")
            time.sleep(1)
            self.process = self._start()

    def _ended(self) -> str:
        code = self.process.poll()
        return "" if code is None else _code(code)


def _code(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"exit code {code}"


def _environment() -> dict[str, str]:
    """This gardo is the one that the worker imports, in whichever Python."""
    here = {str(Path(module.__path__[0]).parent) for module in (gardo, gardo_kernels)}
    paths = [*sorted(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    of_ranks = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    kept = {name: value for name, value in os.environ.items() if name not in of_ranks}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}

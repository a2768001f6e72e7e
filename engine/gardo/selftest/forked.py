"""Ranks forked from one process that has imported everything.

An import of everything takes as long as ten iterations of a tiny model; a fork of it takes none,
and is a process of its own all the same: nothing of an earlier launch is left in it.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from gardo.launch import free_port

PRELOADED = ["gardo.train", "gardo.distributed.zero"]
TIMEOUT = 1500.0


@dataclass(frozen=True)
class Ended:
    """A process: its exit code, negative for a signal, and all that it printed."""

    code: int
    said: str


_prepared: dict[str, Any] = {"modules": PRELOADED, "env": None}


def prepare(modules: Sequence[str], env: Mapping[str, str]) -> None:
    """More to be imported, and the environment, of the process that ranks are forked from.

    Before the first of them is.
    """
    _prepared.update(modules=[*PRELOADED, *modules], env=env)


@functools.cache
def server() -> Any:
    """Where ranks are forked from; starting it does not wait for its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_prepared["modules"])
    with _environment_set(_prepared["env"] or on_cpu()):
        forkserver.ensure_running()
    return context


def on_cpu() -> dict[str, str]:
    """The environment of a process on a CPU: one thread, no advice."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TRANSFORMERS_VERBOSITY": "error",
    }


@contextmanager
def _environment_set(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Launched:
    """Ranks that run `target(*arguments)`; none (0) is one process that no launcher has started.

    `env` is set in each of them before the target runs.
    """

    def __init__(
        self,
        ranks: int,
        target: Callable[..., Any],
        *arguments: Any,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gardo-ranks-"))
        self._logs = [self._folder / f"rank{rank}.txt" for rank in range(max(ranks, 1))]
        port = free_port()
        self.processes = [
            server().Process(
                target=_rank, args=(rank, ranks, port, log, env or {}, target, arguments)
            )
            for rank, log in enumerate(self._logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> str:
        """What rank 0 printed, when all have ended well; AssertionError with a rank's last words
        when one has not."""
        left = {process.sentinel: process for process in self.processes}
        failed: list[Any] = []
        try:
            while left and not failed:
                ended = connection.wait(left, TIMEOUT) or list(left)
                done = [left.pop(sentinel) for sentinel in ended]  # type: ignore[call-overload]
                failed = [process for process in done if process.exitcode != 0]
        finally:
            self.kill()  # those that wait for the one that died
        numbers = [self.processes.index(process) for process in failed]
        everyone = self._taken()
        for rank in numbers:
            one = everyone[rank]
            raise AssertionError(f"rank {rank}, exit code {one.code}:\n{one.said[-6000:]}")
        return everyone[0].said

    def ended(self, timeout: float = TIMEOUT) -> list[Ended]:
        """Every rank, however it ended; those that still run after `timeout` seconds are killed."""
        for process in self.processes:
            process.join(timeout)
        self.kill()
        return self._taken()

    def said(self, rank: int = 0) -> str:
        """What a rank has printed until now."""
        log = self._logs[rank]
        return log.read_text(errors="replace") if log.exists() else ""

    def _taken(self) -> list[Ended]:
        for process in self.processes:
            process.join()
        found = [Ended(p.exitcode, self.said(rank)) for rank, p in enumerate(self.processes)]
        shutil.rmtree(self._folder)
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the ranks that are there."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)


def wait_for(launched: Sequence[Launched]) -> None:
    """Until all have ended well; if one has not, none goes on."""
    try:
        for one in launched:
            one.wait()
    finally:
        for one in launched:
            one.kill()


def _rank(
    rank: int,
    ranks: int,
    port: int,
    log: Path,
    env: Mapping[str, str],
    target: Callable[..., Any],
    arguments: Any,
) -> None:
    """In the new process: what the launcher would set, then the work."""
    from gardo.distributed.base import leave_process_group

    gc.freeze()  # DeepSpeed collects garbage at every start; not among all that was imported
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    if ranks:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        os.environ.update({name: str(value) for name, value in names.items()})
    code = target(*arguments)
    leave_process_group()
    sys.exit(code)

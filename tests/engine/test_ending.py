"""How a process of a run ends: real ones, that are asked to, hang, or lose their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gardo.ending import HUNG, Stop, Watchdog
from gardo.launch import free_port


class Program:
    """Python in a process of its own; what it prints is read as it comes."""

    def __init__(self, code: str, *arguments: object) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout
        self.line = self.process.stdout.readline

    def end(self) -> tuple[int, str, str]:
        said, complained = self.process.communicate(timeout=60)
        return self.process.returncode, said, complained


ASKED = """
import ctypes, os, time
from gardo.ending import Stop
with Stop() as stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print(stop.asked, flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second never returns, and no signal interrupts it
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_and_a_later_one_ends(number: signal.Signals) -> None:
    program = Program(ASKED)
    assert program.line() == "ready\n"
    program.process.send_signal(number)
    assert program.line() == f"{number.value}\n"
    program.process.send_signal(number)  # as launchers do, twice at once
    time.sleep(1.2)
    assert program.process.poll() is None
    program.process.send_signal(number)
    assert program.end()[0] == 128 + number


def test_outside_signals_do_what_they_did() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Stop() as stop:
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not stop.asked
        assert {number: signal.getsignal(number) for number in before} == before
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGHUP, earlier)


class Clock:
    running, moves = "train", 0


HANGING = """
import sys, threading, time, ctypes
from pathlib import Path
from gardo.ending import Watchdog
class Clock: running, moves = "train", 0
with Watchdog(Clock(), 1, Path(sys.argv[1]), rank=3):
    if sys.argv[2] == "call":
        ctypes.CDLL(None).sleep(60)
    if sys.argv[2] == "held":
        time.sleep(0.5)  # until the watchdog has begun
        ctypes.PyDLL(None).sleep(60)  # with Python's lock
"""


def test_what_hangs_is_ended_and_says_where(tmp_path: Path) -> None:
    code, _, complained = Program(HANGING, tmp_path / "stacks", "call").end()
    assert code == HUNG
    for text in (complained, (tmp_path / "stacks").read_text()):
        assert text.startswith("rank 3: no progress in phase 'train' for 1 s (run.watchdog)")
        assert 'File "<string>", line 8 in <module>' in text


def test_even_where_it_keeps_pythons_lock(tmp_path: Path) -> None:
    code, _, complained = Program(HANGING, tmp_path / "stacks", "held").end()
    assert code == 1 and 'File "<string>", line 11 in <module>' in complained


@pytest.mark.parametrize("limit", [0.3, 0])
def test_what_moves_is_left_alone(limit: float, tmp_path: Path) -> None:
    clock = Clock()
    with Watchdog(clock, limit, tmp_path / "stacks", rank=0):
        for _ in range(10):
            time.sleep(0.1)
            clock.moves += bool(limit)
    time.sleep(0.5)  # nor is what comes after it
    assert not (tmp_path / "stacks").exists()


PARENT = """
import os, subprocess, sys, time
child = [sys.executable, "-c", "import os, time; from gardo.ending import dying_with;"
         "dying_with(os.getppid())(); print(os.getpid(), flush=True); time.sleep(60)"]
subprocess.Popen(child)
time.sleep(60)
"""


def test_a_process_ends_with_its_parent() -> None:
    parent = Program(PARENT)
    child = psutil.Process(int(parent.line()))
    parent.process.kill()
    assert psutil.wait_procs([child], timeout=10)[1] == []
    parent.end()


def test_a_process_whose_parent_is_gone_already_ends() -> None:
    code = "from gardo.ending import dying_with; dying_with(1 << 22)(); print('lives')"
    assert Program(code).end() == (128 + signal.SIGKILL, "", "")


LEAVING = """
import atexit, logging, sys, threading
from gardo.ending import leave
logging.basicConfig(filename=sys.argv[1])
atexit.register(lambda: print("at exit", end=""))
print("printed", end=" ")
logging.warning("logged")
class Late:
    def __del__(self): print("taken apart")
late = Late()
leave(7)
"""


def test_nothing_is_lost_in_leaving(tmp_path: Path) -> None:
    """And modules are not taken apart, which is where threads of C++ abort."""
    assert Program(LEAVING, tmp_path / "log").end() == (7, "printed at exit", "")
    assert "logged" in (tmp_path / "log").read_text()


RANK = """
import sys
import torch, torch.distributed as dist
from gardo.ending import leave
dist.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2,
                        init_method=f"tcp://127.0.0.1:{sys.argv[2]}")
works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(200)]
works[150].wait()
del works
leave(0)
"""


@pytest.mark.full  # two imports of torch
def test_threads_of_gloo_do_not_abort_it() -> None:
    """They give tensors back; an interpreter that is taken apart aborts every other time of it."""
    port = free_port()
    ranks = [Program(RANK, rank, port) for rank in range(2)]
    for code, _, complained in [rank.end() for rank in ranks]:
        assert code == 0 and "terminate called" not in complained, complained

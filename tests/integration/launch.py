"""Processes for the tests: ranks forked from one process that has imported everything, and the
deepspeed launcher as a user types it.

An import of everything takes as long as ten iterations of a case; a fork of it takes none, and is a
process of its own all the same: nothing of an earlier launch is left in it.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.integration.cases import Case, dumps

TIMEOUT = 1500.0
WORKER, REPLAY = "tests.integration.worker", "tests.integration.replay"


def environment(accelerator: str = "cpu") -> dict[str, str]:
    """Of a process that a test starts: this checkout, one thread, the scripts of this Python."""
    here = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT)]
    path = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": accelerator,
        "TRANSFORMERS_VERBOSITY": "error",  # no advice on what to install
    }


# ---- forked ranks --------------------------------------------------------------------------------


@functools.cache
def server() -> Any:
    """Where ranks are forked from; starting it does not wait for its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WORKER, REPLAY])
    with _environment_set(environment()):
        forkserver.ensure_running()
    return context


@contextmanager
def _environment_set(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Launched:
    """Ranks that run `target(*arguments)`; none (0) is one process that no launcher has started."""

    def __init__(self, ranks: int, target: Callable[..., Any], *arguments: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gardo-ranks-"))
        self._logs = [self._folder / f"rank{rank}.txt" for rank in range(max(ranks, 1))]
        port = free_port()
        self._processes = [
            server().Process(target=_rank, args=(rank, ranks, port, log, target, arguments))
            for rank, log in enumerate(self._logs)
        ]
        for process in self._processes:
            process.start()

    def wait(self) -> str:
        """What rank 0 printed, when all have ended well; AssertionError with a rank's last words
        when one has not."""
        left = {process.sentinel: process for process in self._processes}
        failed = []
        try:
            while left and not failed:
                ended = connection.wait(left, TIMEOUT) or list(left)
                done = [left.pop(sentinel) for sentinel in ended]  # type: ignore[call-overload]
                failed = [process for process in done if process.exitcode != 0]
        finally:
            self.kill()  # those that wait for the one that died
        said = [log.read_text() if log.exists() else "" for log in self._logs]
        shutil.rmtree(self._folder)
        for process in failed:
            rank = self._processes.index(process)
            last = said[rank][-6000:]
            raise AssertionError(f"rank {rank}, exit code {process.exitcode}:\n{last}")
        return said[0]

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()


def wait_for(launched: Sequence[Launched]) -> None:
    """Until all have ended well; if one has not, none goes on."""
    try:
        for one in launched:
            one.wait()
    finally:
        for one in launched:
            one.kill()


def _rank(
    rank: int, ranks: int, port: int, log: Path, target: Callable[..., Any], arguments: Any
) -> None:
    """In the new process: what the launcher would set, then the work."""
    from gardo.distributed.base import leave_process_group

    gc.freeze()  # DeepSpeed collects garbage at every start; not among all that was imported
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if ranks:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        os.environ.update({name: str(value) for name, value in names.items()})
    code = target(*arguments)
    leave_process_group()
    sys.exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- cases ---------------------------------------------------------------------------------------


def start(ranks: int, folder: Path, cases: Sequence[Case]) -> Launched:
    """Runs the cases one after another, on CPUs."""
    assert len({case.name for case in cases}) == len(cases)
    return Launched(ranks, _run_cases, folder, list(cases))


def _run_cases(folder: Path, cases: Sequence[Case]) -> None:
    from tests.integration.worker import run_cases  # in the new process, where it is there already

    run_cases(folder, cases)


def launch(ranks: int, folder: Path, cases: Sequence[Case]) -> None:
    start(ranks, folder, cases).wait()


def launch_on_gpu(ranks: int, folder: Path, cases: Sequence[Case]) -> None:
    """The same on GPUs, through the deepspeed launcher unless `ranks` is 0."""
    file = folder / f"cases-{len(list(folder.glob('cases-*')))}.json"
    file.write_text(dumps(cases))
    launcher = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port",
                str(free_port()), "--module"] if ranks else []  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *launcher, WORKER, str(folder), str(file)],
        cwd=ROOT, env=environment("cuda"), capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


# ---- the demo's command --------------------------------------------------------------------------

DEMO = ROOT / "recipes" / "tiny_flux_gardo.yaml"
SMALL = [
    "run.steps=1",
    "data.prompts_per_step=2",
    "data.images_per_prompt=4",
    "train.micro_batch=null",
    "evaluate.prompt_count=4",
    "evaluate.images_per_prompt=2",
    "evaluate.batch=4",
    "evaluate.shown=4",
]


def settings_for(folder: Path, *settings: str) -> list[str]:
    """Arguments that make the demo small, with these settings on top."""
    every = (*SMALL, f"run.folder={folder}", "distributed.threads=1", *settings)
    return [part for setting in every for part in ("--set", setting)]


def type_command(
    ranks: int, folder: Path, *settings: str, accelerator: str = "cpu", recipe: Path = DEMO
) -> subprocess.CompletedProcess[str]:
    """Types the demo's command, or another recipe's."""
    env = environment(accelerator)
    script = shutil.which("deepspeed", path=env["PATH"])  # beside packages of another folder: none
    typed = script or f"{sys.executable} -m deepspeed.launcher.runner"
    command = f"{typed} --num_gpus {ranks} --master_port {free_port()} --module gardo.train"
    return subprocess.run(
        [*command.split(), str(recipe.relative_to(ROOT)), *settings_for(folder, *settings)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip

"""Processes for the tests: ranks forked from one process that has imported everything
(gardo.selftest.forked), and the deepspeed launcher as a user types it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gardo.launch import free_port
from gardo.selftest.forked import TIMEOUT, Launched, on_cpu, prepare, server, wait_for
from tests import ROOT
from tests.integration.cases import Case, dumps

__all__ = ["Launched", "free_port", "server", "wait_for"]

WORKER, REPLAY = "tests.integration.worker", "tests.integration.replay"


def environment(accelerator: str = "cpu") -> dict[str, str]:
    """Of a process that a test starts: this checkout, one thread, the scripts of this Python."""
    here = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT)]
    path = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **on_cpu(),  # without advice on what to install
        "PYTHONPATH": path,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DS_ACCELERATOR": accelerator,
    }


prepare([WORKER, REPLAY], environment())


# ---- cases ---------------------------------------------------------------------------------------


def start(
    ranks: int, folder: Path, cases: Sequence[Case], env: Mapping[str, str] | None = None
) -> Launched:
    """Runs the cases one after another, on CPUs."""
    assert len({case.name for case in cases}) == len(cases)
    return Launched(ranks, _run_cases, folder, list(cases), env=env)


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

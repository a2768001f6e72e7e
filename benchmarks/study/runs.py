"""The runs of ./run study: its arms, where a run is kept, what is left to train, and the training.

A folder of runs holds for each of them NAME/ (what `gardo train` writes), NAME.revision (at which
commits it was trained, one a line) and, where several train at a time, NAME.log.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from gardo.distributed.saved import committed
from gardo.report.metrics_log import Record, read_metrics
from pages import ROOT, revision

ARMS = {  # recipe name: (title, colour)
    "tiny_flux_grpo": ("no KL", "#c0392b"),
    "tiny_flux_grpo_kl": ("uniform KL", "#7f8c8d"),
    "tiny_flux_gardo": ("GARDO", "#2471a3"),
}
Study = dict[str, dict[int, list[Record]]]  # {arm: {seed: its evaluations, the start first}}


@dataclass(frozen=True)
class Run:
    """One arm with one seed, in a folder of runs."""

    arm: str
    seed: int
    runs: Path

    @property
    def name(self) -> str:
        return f"{self.arm.replace('_', '-')}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def evaluations(self) -> list[Record]:
        log = self.folder / "metrics.jsonl"
        return [r for r in read_metrics(log) if r["kind"] == "evaluation"] if log.is_file() else []

    def finished(self, steps: int) -> bool:
        """Whether nothing is left to train: the last step is evaluated, its weights exported."""
        exported = (self.folder / "export").is_dir()
        return exported and [r["step"] for r in self.evaluations()][-1:] == [steps]

    def revisions(self) -> list[str]:
        path = self.runs / f"{self.name}.revision"
        return path.read_text(encoding="utf-8").split() if path.is_file() else ["unknown"]

    def record_revision(self, now: str) -> None:
        """To be called before training: what goes on from a checkpoint keeps where that is from."""
        earlier = self.revisions() if committed(self.folder / "checkpoints") else []
        lines = dict.fromkeys([*earlier, now])
        path = self.runs / f"{self.name}.revision"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def command(self, steps: int, overrides: Sequence[str], jobs: int) -> list[str]:
        """Trains what is left: from the newest checkpoint, or from the start without one.

        Alone a run has two ranks, as in the demo; beside others one rank of one thread, without the
        launcher, because two launchers would want the same port.
        """
        own = [f"run.folder={self.runs}", f"run.name={self.name}", f"run.seed={self.seed}"]
        settings = [*own, f"run.steps={steps}", "checkpoint.every=10"]
        settings += ["distributed.threads=1"] if jobs > 1 else []
        module = ["gardo.train"] if jobs > 1 else ["gardo.cli", "train"]
        ranks = [] if jobs > 1 else ["--gpus", "2"]
        recipe = str(ROOT / "recipes" / f"{self.arm}.yaml")
        sets = [part for s in (*settings, *overrides) for part in ("--set", s)]
        return [sys.executable, "-m", *module, recipe, *ranks, "--resume", *sets]


def train(runs: Sequence[Run], steps: int, overrides: Sequence[str], jobs: int) -> None:
    """Trains the runs that are not finished, `jobs` at a time. Cut off, it takes them along."""
    waiting = [run for run in runs if not run.finished(steps)]
    print(f"{len(waiting)} of {len(runs)} runs to train", flush=True)
    running: dict[Run, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start(run, run.command(steps, overrides, jobs), alone=jobs == 1)
            time.sleep(0.2)
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode or not run.finished(steps):
                    raise SystemExit(f"{run.name}: training failed ({process.returncode})")
                print(f"{run.name}: finished", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(run: Run, command: list[str], *, alone: bool) -> subprocess.Popen[bytes]:
    """A process that trains the run; beside others it writes to a file of its own."""
    run.runs.mkdir(parents=True, exist_ok=True)
    run.record_revision(revision())
    env = {"TRANSFORMERS_VERBOSITY": "error", **os.environ}
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it finds none
    with ExitStack() as files:
        log = None
        if not alone:
            log = files.enter_context((run.runs / f"{run.name}.log").open("ab"))
        print(f"{run.name}: training{f', see {log.name}' if log else ''}", flush=True)
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)

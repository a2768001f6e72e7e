"""One cell: trained in this process on one rank, its raw metrics written where they are committed.

A cell that was cut goes on from its newest checkpoint.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gardo.config import load
from gardo.report.metrics_log import read_metrics
from gardo.run_lock import RunLock
from gardo.session import Session, open_session
from gardo.train import train
from pages import revision
from study import raw
from study.drift import drift
from study.protocol import Cell

CLOCK = "seconds.txt"  # in a cell's run: seconds of each sitting


def machine() -> str:
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"diffusers {version('diffusers')}"
    )


def run(cell: Cell, runs: Path, results: Path) -> None:
    """Trains the cell, or what is left of it; one thread on a CPU."""
    start = time.monotonic()
    recipe = load(cell.write_recipe(runs))
    folder = recipe.run_folder
    with RunLock(folder) as lock, open_session(recipe, quiet=True, resume=True, lock=lock) as s:
        revisions = _noted(folder, "revision.txt", revision())
        s.evaluator = WithDrift(s)  # type: ignore[assignment]
        train(s)
        gpu = torch.cuda.get_device_name() if s.engine.device.type == "cuda" else ""
    sittings = _noted(folder, CLOCK, f"{time.monotonic() - start:.1f}")
    about = {
        "kind": "cell", "arm": cell.arm, "seed": cell.seed, "identity": cell.identity,
        "seconds": sum(map(float, sittings)), "revision": " ".join(dict.fromkeys(revisions)),
        "machine": machine(), "gpu": gpu,
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    for step, name in ((0, f"start-seed{cell.seed}"), (recipe.run.steps, cell.name)):
        shutil.copyfile(folder / "samples" / f"step-{step:05d}.png", results / f"{name}.png")
    raw.write(raw.path_of(results, cell), about, read_metrics(folder / "metrics.jsonl"))
    shutil.rmtree(recipe.checkpoint_folder)


def _noted(folder: Path, name: str, line: str) -> list[str]:
    """Adds a line to a file of the run; all of its lines."""
    path = folder / name
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    return path.read_text(encoding="utf-8").split()


class WithDrift:
    """The session's evaluator; its records say how far the policy is from its start."""

    def __init__(self, s: Session) -> None:
        self._session, self._evaluator = s, s.evaluator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._evaluator, name)

    def __call__(self, step: int, *, between: Callable[[], None]) -> dict[str, Any]:
        record = self._evaluator(step, between=between)
        return record | {"drift": drift(self._session) if step else 0.0}

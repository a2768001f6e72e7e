"""A folder in which a case starts small runs of the built-in Flux, and looks at what they left."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gardo.distributed.saved import Saved, committed
from gardo.selftest.forked import Ended, Launched, on_cpu

TINY: dict[str, Any] = {  # an iteration takes a fraction of a second
    "model": {"family": "flux", "path": "builtin:flux", "size": [16, 16], "text_tokens": 8},
    "train": {
        "weights": {"kind": "lora", "rank": 2, "alpha": 4},
        "optimizer": {"lr": 2.0e-3},
        "micro_batch": 4,
    },
    "data": {"prompts": "prompts.txt", "prompts_per_step": 2, "images_per_prompt": 4},
    "sampler": {"steps": 2, "train_steps": 1, "noise_level": 0.7},
    "algorithm": {"name": "flow_grpo", "clip_range": 1.0e-3, "beta": 0.1},
    "rewards": {"tiny_shape": {"role": "proxy"}},
    "evaluate": {"every": 100, "prompt_count": 2, "images_per_prompt": 1, "steps": 1, "batch": 2},
    "checkpoint": {"every": 1, "keep": 2, "background": False},
    "distributed": {"engine": "local", "threads": 1},
    "run": {"name": "tiny", "folder": "runs", "steps": 3, "seed": 7},
}
PROMPTS = "two red circles\none blue square\nthree green circles\none red square\n"


@dataclass(frozen=True)
class Typed(Ended):
    """A command that was typed: also how many seconds it took."""

    seconds: float = 0.0


class Trial:
    """Everything of a case is in `folder`; runs in its `runs`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")

    def recipe(self, file: str = "recipe.yaml", **changes: Any) -> Path:
        """TINY as a file, `changes` by section: `recipe(run={"steps": 5})`. A section that names
        another algorithm, or rewards, replaces the whole."""
        sections = deepcopy(TINY)
        for name, values in changes.items():
            replaced = name in ("rewards", "algorithm") or not isinstance(values, dict)
            sections[name] = values if replaced else {**sections[name], **values}
        runs = Path(sections["run"]["folder"])
        sections["run"]["folder"] = str(self.folder / runs)
        path = self.folder / file
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
        return path

    def run(self, name: str = "tiny") -> Path:
        """The folder of a run."""
        return self.folder / "runs" / name

    def start(
        self, recipe: Path, *arguments: str, ranks: int = 0, env: Mapping[str, str] | None = None
    ) -> Launched:
        """Training, as on the ranks of a launcher, or in one process (0)."""
        return Launched(ranks, _train, [str(recipe), *arguments], env=env)

    def train(
        self,
        recipe: Path,
        *arguments: str,
        ranks: int = 0,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
    ) -> Ended:
        """The same to its end: the worst exit code of the ranks, and what all of them printed."""
        everyone = self.start(recipe, *arguments, ranks=ranks, env=env).ended(timeout)
        worst = max(everyone, key=lambda one: abs(one.code))
        return Ended(worst.code, "\n".join(one.said for one in everyone))

    def until(
        self, holds: Callable[[], bool], run: Launched | None = None, *, timeout: float = 60.0
    ) -> None:
        """Waits until something holds; AssertionError where the run, or the time, ends before."""
        end = time.monotonic() + timeout
        while not holds():
            ended = run is not None and any(p.exitcode is not None for p in run.processes)
            if ended or time.monotonic() > end:
                raise AssertionError(f"waited in vain: {run.said() if run else ''}"[-3000:])
            time.sleep(0.02)

    def type(
        self, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120.0
    ) -> Typed:
        """`gardo ARGUMENTS`, in a process of its own, here."""
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "gardo.cli", *arguments], cwd=self.folder,
            env={**on_cpu(), **(env or {})}, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        return Typed(done.returncode, done.stdout + done.stderr, time.monotonic() - started)


def _train(arguments: list[str]) -> int:
    from gardo.train import main

    return main(arguments)


def bits(run: Path) -> str:
    """Equal for two runs whose newest checkpoints hold the same tensors to the bit."""
    newest = Saved(committed(run / "checkpoints")[0])
    files = sorted((file["name"], file["sha256"]) for file in newest.manifest["files"])
    return hashlib.sha256(repr((newest.step, files)).encode()).hexdigest()


def listing(folder: Path) -> list[str]:
    """All that is in a folder, to see whether something was written."""
    return sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)

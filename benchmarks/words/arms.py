"""The arms of ./run words: what each trains with, and their training, one after the other.

A folder of runs holds for each arm NAME/ (what `gardo train` writes) and NAME.revision (at which
commits it was trained, one a line).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gardo.config import load
from gardo.recipe import Recipe
from gardo.report.metrics_log import Record, read_metrics
from pages import revision
from words.fit import Cut

ARMS = {"no_kl": "no KL", "uniform_kl": "uniform KL", "gardo": "GARDO"}  # recipe: title
SMALL = (  # for a CPU, whatever the recipes say for a GPU
    "train.weights={kind: lora, rank: 16, alpha: 32}",
    "train.optimizer.lr=1e-3",
    "train.micro_batch=48",
    "data.prompts_per_step=6",
    "data.images_per_prompt=8",
    "sampler.steps=6",
    "sampler.train_steps=4",
    "rewards.ocr.workers=0",
    "evaluate.every=1000",
    "evaluate.images_per_prompt=2",
    "evaluate.steps=8",
    "evaluate.batch=36",
    "checkpoint.every=2",
    "distributed.precision=float32",
    "distributed.threads=1",
    "run.steps=6",
)
ENDING = 60.0  # seconds that a run is given to save where it was


def recipe_of(arm: str) -> Path:
    return Path(__file__).with_name(f"{arm}.yaml")


def settings(runs: Path, model: Path, *, small: bool) -> list[str]:
    """What is said beside the recipe: where things are, and with `small` the CPU's budget."""
    files = {
        "model.path": "flux",
        "data.prompts": "prompts.txt",
        "evaluate.prompts": "evaluate.txt",
        "rewards.dinov3.path": "dinov3",
        "rewards.letters.path": "letters.safetensors",
        "rewards.genuine.path": "genuine.safetensors",
    }
    here = [f"{field}={model / file}" for field, file in files.items()]
    return [*here, f"run.folder={runs}", *(SMALL if small else ())]


def run_folder(runs: Path, arm: str) -> Path:
    return runs / arm.replace("_", "-")


def evaluations(folder: Path) -> list[Record]:
    log = folder / "metrics.jsonl"
    return [r for r in read_metrics(log) if r["kind"] == "evaluation"] if log.is_file() else []


def finished(recipe: Recipe) -> bool:
    """Whether nothing is left to train: the last step is evaluated, its weights exported."""
    folder = recipe.run_folder
    steps = [record["step"] for record in evaluations(folder)]
    return (folder / "export").is_dir() and steps[-1:] == [recipe.run.steps]


def train(runs: Path, model: Path, until: float, *, small: bool, sets: Sequence[str] = ()) -> None:
    """Trains what is not finished. Raises Cut at `until`, monotonic seconds."""
    said = [*settings(runs, model, small=small), *sets]
    runs.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        recipe = load(recipe_of(arm), said)
        if finished(recipe):
            continue
        print(f"{ARMS[arm]}: training", flush=True)
        if not _train(runs, arm, said, until - ENDING):
            raise Cut(f"{arm} is not finished")
        if not finished(recipe):
            raise SystemExit(f"{arm}: training failed")


def _train(runs: Path, arm: str, said: Sequence[str], until: float) -> bool:
    """Whether the run ended by itself, by `until`; else it was asked to."""
    note_revision(runs, arm)
    command = [sys.executable, "-m", "gardo.train", str(recipe_of(arm)), "--resume"]
    command += [part for setting in said for part in ("--set", setting)]
    environment = {"TRANSFORMERS_VERBOSITY": "error", **os.environ}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it finds none
    process = subprocess.Popen(command, env=environment)
    try:
        process.wait(max(until - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return False
    finally:  # cut off here, it saves where it was and ends
        process.terminate()
        process.wait()
    return True


def revisions(runs: Path, arm: str) -> list[str]:
    file = runs / f"{arm}.revision"
    return file.read_text(encoding="utf-8").split() if file.is_file() else []


def note_revision(runs: Path, arm: str) -> None:
    lines = dict.fromkeys([*revisions(runs, arm), revision()])
    (runs / f"{arm}.revision").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

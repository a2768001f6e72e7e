"""Memory of real runs beside what `gardo plan` says of them, on two CPU ranks.

    ./run bench memory [CASE ...] [--keep FOLDER]

Each case is a full-size recipe that trains a model of its own width and little depth (random
weights, real_width.py), bent by `--set` alone, through the launcher: two iterations and two
evaluations. Measured is a rank's anonymous memory (heap, not the page cache behind files) above
what it had before anything was loaded, at its peak in every phase, sampled every 2 ms; planned is
the same phase of the plan without what it assumes for CUDA and fragments. Writes
benchmarks/results/memory.csv and its table in docs/distributed.md, a case at a time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import real_width
from bench_load import anonymous
from pages import fill, revision

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.csv"
RANKS, MB = 2, 1e6
FLUX, SD3 = "black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-medium"
# phases of a run, and those of the plan that happen in them
PHASES = {
    "sample": ("sample", "decode"),
    "train": ("teachers", "train", "update"),
    "evaluate": ("evaluate", "decode"),
}
SMALL = (
    "rewards.{proxy}=null", "rewards.aesthetic=null", "rewards.imagereward=null",
    "rewards.pickscore=null",
    "rewards.bright={{kind: 'real_width:Tone', role: proxy}}",
    "rewards.contrast={{kind: 'real_width:Tone', part: std, role: auxiliary}}",
    "rewards.dinov3={{role: features, path: 'builtin:dinov3', size: 32}}",
    "data.prompts={root}/recipes/tiny_prompts.txt", "evaluate.prompts=null",
    "data.prompts_per_step=2", "data.images_per_prompt=2", "sampler.steps=3",
    "sampler.train_steps=2", "train.updates_per_step=1", "model.size=[256, 256]",
    "model.text_tokens=64", "evaluate.prompt_count=2", "evaluate.images_per_prompt=2",
    "evaluate.batch=2", "evaluate.steps=1", "evaluate.every=2", "run.steps=2",
    "distributed.threads=1", "model.encoders=free",
)  # fmt: skip
LORA, FULL = "train.weights.rank=16", "train.weights={{kind: full}}"


@dataclass(frozen=True)
class Case:
    name: str
    recipe: str
    proxy: str  # its reward, which gives way to one without a model
    model: str
    blocks: tuple[int, ...]
    settings: tuple[str, ...]

    def sets(self, model: Path, folder: Path) -> list[str]:
        here = (f"model.path={model}", f"run.folder={folder}", f"run.name={self.name}")
        words = {"proxy": self.proxy, "root": ROOT}
        return [*(s.format(**words) for s in (*SMALL, *self.settings)), *here]


def _cases() -> dict[str, Case]:
    flux = ("flux_gardo_hpsv2.yaml", "hpsv2", FLUX, (1, 1))
    sd3 = ("sd3_gardo_ocr.yaml", "ocr", SD3, (4,))
    ways = {
        "lora": (LORA, "train.micro_batch=4", "distributed.stage=1"),
        "lora_zero3": (LORA, "train.micro_batch=4", "distributed.stage=3"),
        "nf4": (LORA, "train.micro_batch=4", "distributed.stage=1", "model.base=nf4"),
        "full": (FULL, "train.micro_batch=2", "distributed.stage=3"),
    }
    return {
        f"{family}_{way}": Case(f"{family}_{way}", *which, settings)
        for family, which in (("flux", flux), ("sd3", sd3))
        for way, settings in ways.items()
    }


CASES = _cases()


# ---- one rank ------------------------------------------------------------------------------------


class Watch:
    """A run's progress that also knows the peak of its phases."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._now = progress, ""
        self.peaks: dict[str, int] = {}
        self._open = True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._progress, name)

    @contextmanager
    def phase(self, name: str, *, rows: int = 0) -> Iterator[None]:
        outer, self._now = self._now, name
        try:
            with self._progress.phase(name, rows=rows):
                yield
        finally:
            self._now = outer

    def _look(self) -> None:
        while self._open:
            now, seen = self._now, anonymous()
            self.peaks[now] = max(self.peaks.get(now, 0), seen)
            time.sleep(0.002)

    def stop(self) -> None:
        self._open = False
        self._thread.join()


def work(source: str, sets: list[str], out: Path) -> None:
    """One rank of a run."""
    from gardo.config import load
    from gardo.distributed.base import leave_process_group
    from gardo.loading import join_ranks, quiet_libraries
    from gardo.machine import ranks
    from gardo.session import open_session
    from gardo.train import train

    quiet_libraries()
    torch.set_num_threads(1)
    recipe = load(source, sets)
    join_ranks(recipe, torch.device("cpu"))
    before = anonymous()
    session = open_session(recipe, source=source, quiet=True)
    session.progress = watch = Watch(session.progress)
    with session:
        train(session)
        stays = anonymous()
    watch.stop()
    seen = {"stays": stays, **watch.peaks}
    said = {name: value - before for name, value in seen.items() if name}
    (out / f"{ranks()[0]}.json").write_text(json.dumps(said))
    leave_process_group()


# ---- both, and the plan --------------------------------------------------------------------------


def measured(case: Case, model: Path, folder: Path) -> list[dict[str, int]]:
    """Bytes by phase, of each rank."""
    here = [str(ROOT / name) for name in ("engine", "kernels", "benchmarks")]
    paths = os.pathsep.join(filter(None, [*here, os.environ.get("PYTHONPATH", "")]))
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
        # memory that is freed is gone, as it is from CUDA's allocator to the next that asks
        "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072",
    }  # fmt: skip
    source = str(ROOT / "recipes" / case.recipe)
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error",
             "--num_gpus", str(RANKS), "--master_port", str(29300 + os.getpid() % 300), __file__,
             "--worker", source, out, *case.sets(model, folder)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-6000:])
        return [json.loads((Path(out) / f"{r}.json").read_text()) for r in range(RANKS)]


def planned(case: Case, model: Path, folder: Path) -> dict[str, int]:
    """Bytes by phase of the run, without what is assumed."""
    from gardo.config import load
    from gardo.planner import geometry
    from gardo.planner.memory import Counted, total
    from gardo.planner.shadow import Shadow

    recipe = load(ROOT / "recipes" / case.recipe, case.sets(model, folder))
    memory = Counted(Shadow(recipe)).memory(recipe, geometry(recipe, rank=0, world=RANKS), RANKS)
    stays = total(p for p in memory.stays if not p.assumed)
    of = {p.name: stays + total(q for q in p.parts if not q.assumed) for p in memory.phases}
    return {"stays": stays} | {
        name: max(of[part] for part in parts) for name, parts in PHASES.items()
    }


def rows_of(case: Case, models: Path) -> Iterator[dict[str, Any]]:
    import deepspeed
    import diffusers

    model = models / f"{case.model.partition('/')[2]}-{'-'.join(map(str, case.blocks))}"
    if not model.is_dir():
        real_width.make(case.model, model, case.blocks)
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(case, model, Path(folder))
        seen = measured(case, model, Path(folder))
    for phase, bytes_ in plan.items():
        most = max(rank[phase] for rank in seen)
        yield {
            "case": case.name, "recipe": case.recipe, "phase": phase,
            "planned_mb": round(bytes_ / MB), "measured_mb": round(most / MB),
            "planned_over_measured": round(bytes_ / most, 3), "ranks": RANKS,
            "torch": torch.__version__, "deepspeed": deepspeed.__version__,
            "diffusers": diffusers.__version__, "machine": platform.machine(),
            "revision": revision(),
        }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    phases = ("stays", *PHASES)
    lines = [f"| case | {' | '.join(phases)} |", f"|---|{'---|' * len(phases)}"]
    for name in dict.fromkeys(row["case"] for row in rows):
        own = {row["phase"]: row for row in rows if row["case"] == name}
        cells = [
            f"{own[p]['planned_mb']} / {own[p]['measured_mb']} "
            f"({100 * (float(own[p]['planned_over_measured']) - 1):+.0f} %)"
            for p in phases
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = rows[0]
    revisions = ", ".join(dict.fromkeys(row["revision"] for row in rows))
    return "\n".join([
        *lines,
        "",
        "Planned / measured MB of a rank, above what its process had before, on two CPU ranks "
        f"({first['machine']}, torch {first['torch']}, deepspeed {first['deepspeed']}, revision "
        f"{revisions}): models of published width and little depth (`./run bench memory`).",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--keep", type=Path, help="where the models are, or are to stay")
    options = parser.parse_args()
    chosen = options.cases or list(CASES)
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen:
            rows = list(rows_of(CASES[name], options.keep or Path(temporary)))
            for row in rows:
                print("  ".join(f"{k} {v}" for k, v in list(row.items())[:6]), flush=True)
            keep(name, rows)


def keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Puts a case's rows into the results, in the place of its old ones, and into the table."""
    others = []
    if RESULTS.is_file():
        with open(RESULTS, newline="", encoding="utf-8") as file:
            others = [row for row in csv.DictReader(file) if row["case"] != name]
    order = list(CASES)
    rows = sorted([*others, *rows], key=lambda row: order.index(row["case"]))
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    fill(ROOT / "docs" / "distributed.md", "memory", table(rows))


if __name__ == "__main__":
    # the deepspeed launcher adds --local_rank
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if arguments[:1] == ["--worker"]:
        work(arguments[1], arguments[3:], Path(arguments[2]))
    else:
        main()

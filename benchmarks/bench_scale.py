"""How an iteration grows: with images, with trained steps, over time, and with GPUs.

    ./run bench scale [PART ...]        parts: images steps time gathers gpus; all: about 15 minutes

images, steps   seconds of the tiny Flux at four sizes each, one process, the least of 3 launches in
                turns and 5 iterations of each: what a size adds to the one before it, of an image
                or step, against the mean of all
time            200 iterations: the median of each 50 against iterations 11 to 60
gathers         bytes that stage 3 gathers in an iteration on 2 and 4 CPU ranks, counted, beside
                those that the plan says: so often all weights
gpus            A MODEL, not a measurement: FLUX.1-dev by recipes/flux_gardo_hpsv2.yaml on 8 to 512
                GPUs in nodes of 8, with as many images a GPU everywhere. Arithmetic as `gardo plan`
                assumes it, or as measured on one GPU (--phases, a CSV of `./run bench step`);
                gathers and reductions by their bytes over the links that `gardo plan` states, none
                of them hidden behind arithmetic

Writes results/scale.csv and its tables in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from collectives import Collectives
from pages import ROOT, fill, revision

RESULTS = ROOT / "benchmarks" / "results" / "scale.csv"
TINY = ROOT / "recipes" / "tiny_flux_gardo.yaml"
FLUX = ROOT / "recipes" / "flux_gardo_hpsv2.yaml"
PARTS = ("images", "steps", "time", "gathers", "gpus")
IMAGES, STEPS, ITERATIONS = (16, 32, 64, 128), (1, 3, 5, 7), 200
TURNS = 3
GPUS = (8, 16, 32, 64, 128, 256, 512)
SMALL = (
    "train.micro_batch=4", "train.updates_per_step=1", "train.keep_all_rows=true",
    "data.images_per_prompt=4", "evaluate.prompt_count=1", "evaluate.images_per_prompt=1",
    "evaluate.steps=1", "evaluate.batch=1", "evaluate.every=100000", "checkpoint.every=100000",
    "algorithm.reference=null", "algorithm.gate.limits=[0.1, 0.1]", "run.name=run",
)  # fmt: skip
RANKED = (
    "distributed.engine=zero", "distributed.stage=3", "distributed.threads=1",
    "distributed.live_parameters=1000", "distributed.reuse_distance=0",
    "distributed.prefetch_bucket=0", "rollout.gather=iteration", "sampler.steps=4",
    "sampler.train_steps=2",
)  # fmt: skip
Row = dict[str, Any]


# ---- runs ----------------------------------------------------------------------------------------


def iterations(sets: Sequence[str], count: int) -> list[float]:
    """Seconds of so many iterations of the tiny recipe, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*SMALL, *sets, f"run.steps={count}", f"run.folder={folder}"]
        _process([str(TINY), *(part for one in arguments for part in ("--set", one))])
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [sum(r["seconds"].values()) for r in records if r["kind"] == "step"]


def _process(arguments: Sequence[str], ranks: int = 1, module: str = "gardo.train") -> None:
    here = [str(ROOT / name) for name in ("engine", "kernels", "benchmarks")]
    paths = os.pathsep.join(filter(None, [*here, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    runner = ["deepspeed.launcher.runner", "--log_level", "error", "--num_gpus", str(ranks),
              "--master_port", str(29300 + os.getpid() % 300), "--module"]  # fmt: skip
    command = [sys.executable, "-m", *(runner if ranks > 1 else ()), module, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-6000:])


def growth(part: str) -> Iterator[Row]:
    """Seconds at each size; what a size adds to the one before it, of one image or step, against
    the same of all from the first size to the last."""
    sizes = IMAGES if part == "images" else STEPS
    best = dict.fromkeys(sizes, math.inf)
    for turn in range(TURNS):
        for size in sizes:
            sets = {
                "images": ("sampler.steps=4", "sampler.train_steps=2",
                           f"data.prompts_per_step={size // 4}"),
                "steps": ("sampler.steps=8", f"sampler.train_steps={size}",
                          "data.prompts_per_step=8"),
            }[part]  # fmt: skip
            took = min(iterations(("distributed.engine=local", *sets), 6)[1:])
            best[size] = min(best[size], took)
            print(f"  turn {turn + 1}, {part} {size}: {took:.3f} s", flush=True)
    first, last = sizes[0], sizes[-1]
    each = (best[last] - best[first]) / (last - first)
    yield _row(part, first, best[first], added_against_mean="-")
    for before, size in pairwise(sizes):
        added = (best[size] - best[before]) / (size - before)
        yield _row(part, size, best[size], added_against_mean=round(added / each, 3))


def over_time() -> Iterator[Row]:
    """Medians of windows of a long run."""
    sets = ("distributed.engine=local", "data.prompts_per_step=2", "sampler.steps=4",
            "sampler.train_steps=2")  # fmt: skip
    seconds = iterations(sets, ITERATIONS)
    early = median(seconds[10:60])
    for first in range(10, ITERATIONS, 50):
        window = seconds[first : first + 50]
        yield _row("time", f"{first + 1} to {first + len(window)}", median(window),
                   against_first=round(median(window) / early, 3))  # fmt: skip


# ---- gathers -------------------------------------------------------------------------------------


class Gathered:
    """Ends of iterations, in the place of a profile: bytes of weights gathered in the last one."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives, self.last = collectives, 0

    def step(self) -> None:
        self.last = self.collectives.bytes["all_gather_into_tensor"]
        self.collectives.clear()

    def close(self) -> None:
        pass


def count_gathers(out: Path, sets: Sequence[str]) -> None:
    """One rank: bytes gathered in an iteration that asks teachers, and the plan's bytes."""
    from gardo.config import load
    from gardo.distributed.base import leave_process_group
    from gardo.planner import geometry
    from gardo.planner.time import gathers
    from gardo.session import open_session
    from gardo.train import train

    recipe = load(TINY, [*SMALL, *RANKED, *sets])
    with Collectives() as collectives:
        session = open_session(recipe, quiet=True)
        weights = sum(
            p.ds_numel * p.element_size() for p in session.policy.transformer.parameters()
        )
        gathered = Gathered(collectives)
        session.profile = gathered  # type: ignore[assignment]
        with session:
            train(session)
    plan = geometry(recipe, rank=0, world=session.engine.world)
    if session.engine.rank == 0:
        said = {"counted": gathered.last, "weights": weights, "gathers": gathers(recipe, plan)}
        out.write_text(json.dumps(said))
    leave_process_group()


def gathers_on(ranks: int) -> Iterator[Row]:
    """LoRA and full, on so many ranks."""
    for weights in ("lora", "full"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "seen.json"
            of = "{kind: lora, rank: 8, alpha: 16}" if weights == "lora" else "{kind: full}"
            sets = [f"train.weights={of}", f"data.prompts_per_step={2 * ranks}",
                    f"run.folder={folder}", "run.steps=3"]  # fmt: skip
            _process(["--worker", str(out), *sets], ranks, "bench_scale")
            seen = json.loads(out.read_text())
        planned = seen["weights"] * seen["gathers"]
        yield _row("gathers", f"{weights}, {ranks} ranks", "", gathers=seen["gathers"],
                   planned_mb=round(planned / 1e6, 2), counted_mb=round(seen["counted"] / 1e6, 2),
                   counted_of_planned=round(seen["counted"] / planned, 4))  # fmt: skip


# ---- many GPUs -----------------------------------------------------------------------------------


def on_gpus(phases: Path | None) -> Iterator[Row]:
    """The model: for LoRA at stage 1 and all weights at stage 3."""
    from gardo.config import load
    from gardo.planner import geometry
    from gardo.planner.shadow import Shadow
    from gardo.planner.time import NETWORK, NVLINK, seconds

    measured = _measured(phases) if phases else None
    prompts = f"data.prompts={ROOT / 'recipes' / 'tiny_prompts.txt'}"
    ways = {"lora, stage 1": (), "full, stage 3": ("train.weights={kind: full}",
                                                   "distributed.stage=3")}  # fmt: skip
    for way, sets in ways.items():
        shadow = Shadow(load(FLUX, [prompts, *sets]))
        alone = 0.0
        for gpus in GPUS:
            recipe = load(FLUX, [prompts, *sets, f"data.prompts_per_step={6 * gpus}"])
            plan = geometry(recipe, rank=0, world=gpus)
            took = seconds(recipe, shadow, plan, gpus, gpus // 8)
            link = NVLINK if gpus == 8 else NETWORK
            reduced = 2 * 4 * shadow.trainable * recipe.train.updates_per_step / link
            arithmetic = measured or took.total
            exchanged = took.gathering + reduced
            alone = alone or (arithmetic + exchanged)
            total, images = arithmetic + exchanged, plan.samples * gpus
            yield _row("gpus", f"{way}, {gpus}", total, exchanged_s=round(exchanged, 2),
                       images_per_second=round(images / total, 2),
                       efficiency=round(alone / total, 3),
                       arithmetic="measured" if measured else "assumed")  # fmt: skip


def _measured(path: Path) -> float:
    """Seconds of an iteration of one GPU, from the rows of `./run bench step`."""
    with path.open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if (r["side"], r["phase"]) == ("ours", "iteration")]
    return median(float(row["seconds"]) for row in rows)


# ---- results -------------------------------------------------------------------------------------


def _row(part: str, size: Any, seconds: Any, **more: Any) -> Row:
    said = round(seconds, 3) if isinstance(seconds, float) else seconds
    return {"part": part, "size": size, "seconds": said, **more, "revision": revision()}


def table(rows: Sequence[Row]) -> str:
    """A table a part."""
    tables = []
    for part in dict.fromkeys(row["part"] for row in rows):
        of = [{k: v for k, v in row.items() if k not in ("part", "revision") and v != ""}
              for row in rows if row["part"] == part]  # fmt: skip
        names = [part, *list(of[0])[1:]]
        lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |",
                 "|---" * len(names) + "|"]  # fmt: skip
        lines += [f"| {' | '.join(map(str, row.values()))} |" for row in of]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="*", help=" ".join(PARTS))
    parser.add_argument("--phases", type=Path, help="a CSV of bench step, from one GPU")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        count_gathers(Path(options.worker[0]), options.worker[1:])
        return
    if unknown := set(options.part) - set(PARTS):
        parser.error(f"{sorted(unknown)[0]}: no part; {', '.join(PARTS)}")
    rows: list[Row] = []
    for part in options.part or PARTS:
        if part in ("images", "steps"):
            rows += growth(part)
        elif part == "time":
            rows += over_time()
        elif part == "gathers":
            rows += [row for ranks in (2, 4) for row in gathers_on(ranks)]
        else:
            rows += on_gpus(options.phases)
    print(table(rows))
    if not options.part:
        names = dict.fromkeys(name for row in rows for name in row)
        with RESULTS.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(names), restval="")
            writer.writeheader()
            writer.writerows(rows)
        fill(ROOT / "benchmarks" / "README.md", "scale", table(rows))


if __name__ == "__main__":
    main()

"""What ZeRO adds to a micro-batch: one process, stage 1 and stage 3 on a tiny model.

    ./run bench zero [--launches 4] [--repetitions 3]

The built-in tiny Flux (width 96) is so small that hooks, gathering and reductions show. Every way
to train it is launched several times, in turns, each in processes of its own with a thread a rank:
two warm-up iterations of gardo's own loop, then so many that count, each one update of 6
micro-batches of 4 rows a rank. A micro-batch is its forward and its backward pass on rank 0; the
first of an iteration, whose forward pass belongs to the ratio contract, is left out. A step is the
optimizer's, with what the ranks reduce and gather there. Writes benchmarks/results/zero.csv and the
table of docs/distributed.md.
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

from collectives import Collectives
from pages import ROOT, fill, revision

RESULTS = ROOT / "benchmarks" / "results" / "zero.csv"
RECIPE = ROOT / "recipes" / "tiny_flux_grpo.yaml"
WARM_UP = 2  # iterations; DeepSpeed learns the order of the modules in the first
WEIGHTS = {"LoRA": "train.weights={kind: lora, rank: 16, alpha: 32}",
           "full": "train.weights={kind: full}"}  # fmt: skip
EXCHANGED = ("collectives", "megabytes", "step_collectives", "step_megabytes")
SMALL = (
    "data.images_per_prompt=4", "sampler.steps=4", "sampler.train_steps=3", "train.micro_batch=4",
    "train.updates_per_step=1", "train.keep_all_rows=true", "evaluate.prompt_count=2",
    "evaluate.images_per_prompt=1", "evaluate.steps=1",  "evaluate.diversity=none",
    "checkpoint.every=1000", "distributed.threads=1",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    name: str
    ranks: int
    settings: tuple[str, ...]


WAYS = (
    Way("one process", 1, ("distributed.engine=local",)),
    *(Way(f"stage {n}", ranks, (f"distributed.stage={n}",)) for ranks in (1, 2) for n in (1, 3)),
)


# ---- one rank ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A call: how long it took, and what it had the ranks exchange."""

    seconds: float
    collectives: int
    bytes: int

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            self.seconds + other.seconds,
            self.collectives + other.collectives,
            self.bytes + other.bytes,
        )


def watched(
    function: Callable[..., Any], collectives: Collectives, seen: list[Seen]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls, bytes_ = collectives.calls.total(), collectives.bytes.total()
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            calls, bytes_ = collectives.calls.total() - calls, collectives.bytes.total() - bytes_
            seen.append(Seen(seconds, calls, bytes_))

    return call


def trained(settings: Sequence[str], collectives: Collectives) -> dict[str, float]:
    """What a micro-batch and a step of a run took: median milliseconds, mean exchange."""
    from gardo.config import load
    from gardo.session import open_session
    from gardo.train import train

    forward: list[Seen] = []
    backward: list[Seen] = []
    steps: list[Seen] = []
    session = open_session(load(RECIPE, settings), quiet=True)
    engine, algorithm = cast(Any, session.engine), cast(Any, session.algorithm)
    algorithm.loss = watched(algorithm.loss, collectives, forward)
    engine.backward = watched(engine.backward, collectives, backward)
    engine.step = watched(engine.step, collectives, steps)
    with session:
        train(session)
    each = len(steps) // session.recipe.run.steps
    both = [one + two for one, two in zip(forward, backward, strict=True)]
    counted = [b for i, b in enumerate(both) if i >= WARM_UP * each and i % each]
    stepped = steps[each - 1 :: each][WARM_UP:]  # the others only say that an update goes on
    return {
        "micro_batch_ms": 1e3 * median(b.seconds for b in counted),
        "collectives": fmean(b.collectives for b in counted),
        "megabytes": fmean(b.bytes for b in counted) / 1e6,
        "step_ms": 1e3 * median(s.seconds for s in stepped),
        "step_collectives": fmean(s.collectives for s in stepped),
        "step_megabytes": fmean(s.bytes for s in stepped) / 1e6,
    }


def work(out: Path, repetitions: int, ranks: int, settings: Sequence[str]) -> None:
    from gardo.distributed.base import leave_process_group

    seen = {}
    with Collectives() as collectives:
        for weights, kind in WEIGHTS.items():
            run = (f"run.folder={out.parent}", f"run.name={weights}",
                   f"run.steps={WARM_UP + repetitions}", f"evaluate.every={WARM_UP + repetitions}",
                   f"data.prompts_per_step={2 * ranks}")  # fmt: skip
            seen[weights] = trained([*SMALL, *settings, kind, *run], collectives)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(seen))
    leave_process_group()


# ---- all of them ---------------------------------------------------------------------------------


def launched(way: Way, repetitions: int) -> dict[str, dict[str, float]]:
    """What rank 0 of a launch saw, by what is trained."""
    here = [str(ROOT / name) for name in ("engine", "kernels", "benchmarks")]
    paths = os.pathsep.join(filter(None, [*here, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": paths}  # fmt: skip
    runner = ["-m", "deepspeed.launcher.runner", "--log_level", "error", "--num_gpus",
              str(way.ranks), "--master_port", str(29300 + os.getpid() % 300)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seen.json"
        done = subprocess.run(
            [sys.executable, *(runner if way.ranks > 1 else ()), __file__, "--worker", str(out),
             str(repetitions), str(way.ranks), *way.settings],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-6000:])
        seen: dict[str, dict[str, float]] = json.loads(out.read_text())
        return seen


def rows_of(launches: int, repetitions: int) -> list[dict[str, Any]]:
    found: dict[Way, list[dict[str, dict[str, float]]]] = {way: [] for way in WAYS}
    for turn in range(launches):
        for way in WAYS[:: -1 if turn % 2 else 1]:
            found[way].append(launched(way, repetitions))
            print(turn, way.name, way.ranks, found[way][-1], flush=True)
    rows = []
    for way, seen in found.items():
        for weights in WEIGHTS:
            own = [launch[weights] for launch in seen]
            milliseconds = sorted(launch["micro_batch_ms"] for launch in own)
            rows.append({
                "way": way.name, "ranks": way.ranks, "weights": weights,
                "micro_batch_ms": round(median(milliseconds), 1),
                "least_ms": round(milliseconds[0], 1), "most_ms": round(milliseconds[-1], 1),
                "step_ms": round(median(launch["step_ms"] for launch in own), 1),
                **{name: round(own[0][name], 2) for name in EXCHANGED},
                "launches": launches, "repetitions": repetitions, "torch": version("torch"),
                "deepspeed": version("deepspeed"), "machine": platform.machine(),
                "revision": revision(),
            })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a way and a column each for LoRA and full fine-tuning."""
    of_each = ", ".join(("a micro-batch", "collectives", "a step", "collectives"))
    lines = [
        f"| | ranks | {' | '.join(f'{weights}: {of_each}' for weights in WEIGHTS)} |",
        "|---|---|" + "---|" * len(WEIGHTS),
    ]
    for way in WAYS:
        own = {r["weights"]: r for r in rows if (r["way"], r["ranks"]) == (way.name, way.ranks)}
        cells = (
            f"{r['micro_batch_ms']} ms ({r['least_ms']} to {r['most_ms']}), "
            f"{r['collectives']:.1f}, {r['step_ms']} ms, {r['step_collectives']:.0f}"
            for r in (own[weights] for weights in WEIGHTS)
        )
        lines.append(f"| {way.name} | {way.ranks} | {' | '.join(cells)} |")
    first = rows[0]
    return "\n".join([
        *lines,
        "",
        "The built-in tiny Flux, width 96, 4 rows a micro-batch and 6 micro-batches an update on "
        f"each rank, one CPU thread a rank: median of {first['launches']} launches in turns of "
        f"{first['repetitions']} iterations\n(least to most of a launch; `./run bench zero`; "
        f"{first['machine']}, torch {first['torch']}, deepspeed {first['deepspeed']}, revision "
        f"{first['revision']}).",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--launches", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    rows = rows_of(options.launches, options.repetitions)
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fill(ROOT / "docs" / "distributed.md", "zero", table(rows))


if __name__ == "__main__":
    # the deepspeed launcher adds --local_rank
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if arguments[:1] == ["--worker"]:
        work(Path(arguments[1]), int(arguments[2]), int(arguments[3]), arguments[4:])
    else:
        main()

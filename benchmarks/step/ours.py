"""A side of the step benchmark that is this engine: a recipe as it is, or with one thing changed.

    PYTHONPATH=benchmarks:engine:kernels \\
        python -m step.ours RECIPE [--set FIELD=VALUE ...] --side NAME --iterations N --out FILE

FILE has the iterations as `step.released` writes them, seconds by phase, calls and rows; the rate
of matrix products in this process; the peak of memory. With `--count` nothing is timed and nothing
compiled: FLOPs by the shapes of modules, and launches, host waits and FLOPs of the last iteration,
but for launches and waits that a compiler would make others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from block_traffic import flux_traffic
from gardo.config import load
from gardo.distributed.base import leave_process_group
from gardo.machine import ranks
from gardo.planner.time import AGAIN
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.report.metrics_log import step_records
from gardo.session import Session, open_session
from gardo.train import train
from gardo.types import Credit, Points
from step.executed import Executed
from step.flops import counted

PEAKS = {"H100": 989e12, "H200": 989e12}  # FLOP/s, published: bf16, dense


@dataclass(frozen=True)
class Side:
    """What is changed: fields of the recipe, and the session before it trains."""

    what: str
    sets: tuple[str, ...] = ()
    change: Callable[[Session], None] = lambda session: None


def reference_everywhere(session: Session) -> None:
    """Teachers speak at every row; the losses weigh what they say as before."""
    asked = session.algorithm.teachers

    def everywhere(points: Points, credit: Credit) -> dict[str, Tensor]:
        return {name: torch.ones_like(rows) for name, rows in asked(points, credit).items()}

    session.algorithm.teachers = everywhere  # type: ignore[method-assign]


def encoded_again(session: Session) -> None:
    """Nothing is remembered of a prompt."""
    embeddings = session.policy.embeddings
    embeddings._look_up = lambda prompt: None  # type: ignore[method-assign]


SIDES = {
    "ours": Side("as the recipe says"),
    "strong": Side(
        "torch's own operators instead of the kernels, compiled blocks on a GPU",
        ("kernels=torch", "train.compile=auto"),
    ),
    "compiled": Side("compiled blocks", ("train.compile=blocks",)),
    "folded": Side("the LoRA folded into its layers", ("train.weights.folded=true",)),
    "block_kernels": Side("our kernels between matmuls", ("model.block_kernels=true",)),
    "compiled_folded": Side(
        "compiled blocks, the LoRA folded", ("train.compile=blocks", "train.weights.folded=true")
    ),
    "kernels_folded": Side(
        "our kernels between matmuls, the LoRA folded",
        ("model.block_kernels=true", "train.weights.folded=true"),
    ),
    "reference_everywhere": Side("the reference on every row", (), reference_everywhere),
    "encoded_again": Side("prompts through the text encoders every time", (), encoded_again),
    "all_rows": Side("rows that weigh nothing are trained too", ("train.keep_all_rows=true",)),
    "gathered_each": Side("ZeRO-3 gathers at every forward", ("rollout.gather=step",)),
}


class Meter:
    """Ends of iterations, in the place of a profile: watches modules in the first, which warms up,
    and counts what one later executes."""

    def __init__(self, session: Session, *, count_at: int) -> None:
        transformer, phases = session.policy.transformer, session.progress.phases
        self._watching, self._at, self._step = ExitStack(), count_at, 0
        self.flops = self._watching.enter_context(counted(transformer, lambda: phases.running))
        self.executed = Executed(transformer)

    def step(self) -> None:
        """An iteration has ended."""
        self._step += 1
        self.close()
        if self._step == self._at:
            self.executed.start()

    def close(self) -> None:
        self._watching.close()
        self.executed.stop()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products, the best median of two sizes."""
    rates = []
    for n in (1024, 2048) if device.type == "cpu" else (8192, 16384):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(8):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        rates.append(2 * n**3 / median(times))
    return max(rates)


def run(recipe_path: str, sets: list[str], side: Side, count: bool) -> dict[str, Any]:
    """Trains the recipe with the side's change; what it took."""
    sets = [*sets, *side.sets, "run.keep_samples=null"]  # else the counted iteration keeps some
    recipe = load(recipe_path, sets)
    compiles = recipe.train.compile
    if count:  # hooks and modes that count would be compiled too
        recipe = load(recipe_path, [*sets, "train.compile=none"])
    session = open_session(recipe, source=recipe_path, quiet=True)
    side.change(session)
    if count:
        meter = Meter(session, count_at=recipe.run.steps - 1)
        session.profile = meter  # type: ignore[assignment]
    device = session.engine.device
    compiled = compiles == "blocks" or (compiles == "auto" and device.type == "cuda")
    with session:
        train(session)
        peak = session.progress.phases.memory.reserved
    rate, iterations = matmul_rate(device, session.policy.dtype), step_records(recipe.run_folder)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "ranks": session.engine.world,
        "device": name,
        "peak_flops": next((peak for gpu, peak in PEAKS.items() if gpu in name), None),
        "matmul_rate": rate,
        "peak_bytes": peak,
        "row_bytes": row_bytes(session) if device.type == "cuda" else None,
        "iterations": iterations,
        **(counts(meter, recipe, iterations[0]) if count else {}),
        **({"launches": "", "waits": ""} if compiled else {}),
    }


def counts(meter: Meter, recipe: Recipe, first: dict[str, Any]) -> dict[str, Any]:
    """What the meter has seen: FLOPs of a row, and what the counted iteration executed."""
    of_row = row_flops(meter, recipe.train.activation_checkpointing, first)
    return {"row_flops": of_row, **meter.executed.counts()}


def row_flops(meter: Meter, checkpointing: str, first: dict[str, Any]) -> dict[str, float]:
    """Of a row: a forward pass, forward and backward, and with what checkpointing runs again."""
    forward = meter.flops.forward["sample"] / first["rows"]["sample"]
    trained = [name for name in ("probe", "train") if name in first["rows"]]
    rows = sum(first["rows"][name] for name in trained)
    both = sum(meter.flops.total[name] for name in trained) / rows
    return {"forward": forward, "training": both, "executed": both + AGAIN[checkpointing] * forward}


def row_bytes(session: Session) -> dict[str, float] | None:
    """Beside matmuls and attention, of a row: forward, forward and backward. The model of an H100;
    none for other models than Flux."""
    recipe, policy = session.recipe, session.policy
    if recipe.model.family != "flux":
        return None
    ways = {
        "compiled": recipe.train.compile != "none",
        "kernels": recipe.model.block_kernels,
        "folded": getattr(recipe.train.weights, "folded", False),
    }
    lora = recipe.train.weights.kind == "lora"
    path = "+".join(name for name, taken in ways.items() if taken)
    moved = flux_traffic(path, policy.transformer, lora)
    tokens = policy.latent_shape[0] + recipe.model.text_tokens
    again = recipe.train.activation_checkpointing != "none"
    return {"forward": tokens * moved.forward, "executed": tokens * moved.training(again)}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 for a recipe that cannot be used."""
    parser = argparse.ArgumentParser("step.ours", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--side", choices=sorted(SIDES), default="ours")
    parser.add_argument("--iterations", type=int, default=3, help="the first one warms up")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="written when all is done")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = options.out.with_suffix("")
    sets = [*options.sets, f"run.steps={options.iterations}", f"run.folder={folder}"]
    try:
        record = run(options.recipe, sets, SIDES[options.side], options.count)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    first = ranks()[0] == 0
    leave_process_group()
    if first:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

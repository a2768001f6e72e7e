"""Host memory while a model is loaded on two ranks: streamed and partitioned, or whole on each.

    ./run bench load [--dim 2048] [--weights lora full]

Makes a Flux of random bf16 weights (about a billion parameters at --dim 2048: 4 + 6 blocks) around
the tiny Flux's text encoders and VAE, then starts the engine on it as a run does, once as gardo
loads (`streamed`: built without weights, each parameter read by rank 0 alone and partitioned before
the next) and once as DeepSpeed is usually given a model (`whole`: every rank loads all of it, then
it is partitioned). Reported, for each rank: anonymous memory (heap, not the page cache behind the
files) before loading, at its peak, and when the engine is ready; peaks are sampled every 2 ms.
Writes benchmarks/results/load.csv and its table in docs/distributed.md. A launch that trains all
weights needs about seven times the model's size in memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pages import fill, revision

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "load.csv"
MIB = 2**20


def make_model(folder: Path, dim: int) -> int:
    """A FluxPipeline folder with a random transformer of width `dim`; returns its parameters."""
    from diffusers import FluxTransformer2DModel

    from gardo.settings import model_path

    shutil.copytree(model_path("builtin:flux"), folder)
    tiny = json.loads((folder / "transformer" / "config.json").read_text())
    shutil.rmtree(folder / "transformer")
    names = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
    model = FluxTransformer2DModel(
        num_layers=4, num_single_layers=6, num_attention_heads=dim // 128, attention_head_dim=128,
        axes_dims_rope=(16, 56, 56), **{name: tiny[name] for name in names},
    ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(folder / "transformer", max_shard_size="500MB")
    return sum(p.numel() for p in model.parameters())


def recipe_for(folder: Path, weights: str) -> dict[str, Any]:
    train = {"lora": {"kind": "lora", "rank": 32, "alpha": 64}, "full": {"kind": "full"}}[weights]
    return {
        "model": {"family": "flux", "path": str(folder), "size": [32, 32], "text_tokens": 8},
        "train": {"weights": train},
        "data": {"prompts": str(ROOT / "recipes" / "tiny_prompts.txt"), "prompts_per_step": 2,
                 "images_per_prompt": 2},
        "sampler": {"steps": 2, "train_steps": 1},
        "algorithm": {"name": "flow_grpo"},
        "rewards": {"tiny_shape": {"role": "proxy"}},
        "rollout": {"gather": "step"},  # gathering once would hold all of it, whatever the loading
        "distributed": {"precision": "bfloat16", "stage": 3, "threads": 1},
        "run": {"name": "load", "steps": 1},
    }  # fmt: skip


class Peak:
    """The largest anonymous memory of this process, in bytes, while it is open."""

    def __enter__(self) -> Peak:
        self.before = self.value = anonymous()
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            self.value = max(self.value, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()
        self.after = anonymous()


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this measures on Linux only")


def load_whole(policy: Any) -> None:
    """As diffusers loads it, in the policy's place."""
    from gardo.policies.weights import fill

    loaded = policy.transformer_class.from_pretrained(
        policy.folder / "transformer", torch_dtype=policy.dtype
    )
    weights = dict(loaded.named_parameters())
    fill(
        policy.transformer,
        lambda name: weights[name.replace(".base_layer.", ".")].detach(),
        device=policy.device,
        dtype=policy.dtype,
    )


def work(folder: Path, weights: str, way: str, out: Path) -> None:
    """One rank: starts the engine as a run does, and says what that took."""
    from gardo.config import check
    from gardo.distributed.base import leave_process_group
    from gardo.loading import build_engine, build_policy, join_ranks, quiet_libraries
    from gardo.machine import ranks
    from gardo.planner import geometry

    torch.set_num_threads(1)
    quiet_libraries()
    rank, _, world = ranks()
    recipe = check(recipe_for(folder, weights), "bench_load")
    device = torch.device("cpu")
    policy = build_policy(recipe, device)  # text encoders and VAE, and a transformer of no weights
    join_ranks(recipe, device)
    with Peak() as peak:
        start = time.perf_counter()
        if way == "whole":
            load_whole(policy)
            policy.load_transformer = lambda **_: None  # type: ignore[method-assign]
        engine = build_engine(recipe, policy, geometry(recipe, rank=rank, world=world), device)
        seconds = time.perf_counter() - start
    numbers = {"before": peak.before, "peak": peak.value, "after": peak.after}
    (out / f"{rank}.json").write_text(json.dumps({**numbers, "seconds": seconds}))
    engine.barrier()
    engine.close()
    leave_process_group()


def measure(folder: Path, weights: str, way: str) -> list[dict[str, float]]:
    """Both ranks' numbers of one launch."""
    with tempfile.TemporaryDirectory() as temporary:
        here = [str(ROOT / "engine"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": os.pathsep.join(filter(None, here))}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error",
             "--num_gpus", "2", "--master_port", str(29300 + os.getpid() % 300), __file__,
             "--worker", str(folder), weights, way, temporary],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return [json.loads((Path(temporary) / f"{rank}.json").read_text()) for rank in (0, 1)]


def rows_of(dim: int, kinds: list[str]) -> list[dict[str, Any]]:
    import deepspeed

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "flux"
        parameters = make_model(folder, dim)
        for weights in kinds:
            for way in ("streamed", "whole"):
                for rank, seen in enumerate(measure(folder, weights, way)):
                    grown = {n: round((seen[n] - seen["before"]) / MIB) for n in ("peak", "after")}
                    rows.append({
                        "parameters": parameters, "model_mib": round(2 * parameters / MIB),
                        "weights": weights, "way": way, "rank": rank,
                        "before_mib": round(seen["before"] / MIB),
                        "peak_above_mib": grown["peak"], "after_above_mib": grown["after"],
                        "seconds": round(seen["seconds"], 1), "torch": torch.__version__,
                        "deepspeed": deepspeed.__version__, "machine": platform.machine(),
                        "revision": revision(),
                    })  # fmt: skip
                    print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a page shows them."""
    first = rows[0]
    lines = [
        "| trained | loaded | rank | peak while loading, MiB | afterwards, MiB | seconds |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['weights']} | {r['way']} | {r['rank']} | {r['peak_above_mib']} "
            f"| {r['after_above_mib']} | {r['seconds']} |"
            for r in rows
        ),
        "",
        f"{int(first['parameters']) / 1e9:.2f} billion random parameters, {first['model_mib']} MiB "
        "in bf16, two ranks: anonymous memory of each rank above what it had before (`./run bench "
        f"load`; {first['machine']}, torch {first['torch']}, deepspeed {first['deepspeed']}, "
        f"revision {first['revision']}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dim", type=int, default=2048, help="width; a multiple of 128")
    parser.add_argument("--weights", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = rows_of(options.dim, options.weights)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if options.out == RESULTS:
        fill(ROOT / "docs" / "distributed.md", "load", table(rows))
    print(options.out)


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if arguments[:1] == ["--worker"]:
        work(Path(arguments[1]), arguments[2], arguments[3], Path(arguments[4]))
    else:
        main()

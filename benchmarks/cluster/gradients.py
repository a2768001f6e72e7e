"""The first update's gradient at ZeRO's stages, in three buckets: the same as in one at stage 1?

    python -m cluster.gradients --out FOLDER RECIPE --gpus N ...

What stands behind --out is handed to `gardo train`. AdamW's first moment after one update is the
gradient, times a constant. Exit code 1 where a stage's is further off than rounding: that stage
then sums wrongly, with or without `distributed.overlap`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.resume import finished, train
from gardo.config import check, read_yaml
from gardo.distributed.saved import Saved, committed

BUCKETS = 3
STAGES = ((1, False), (2, False), (2, True), (3, False), (3, True))  # with `distributed.overlap`
# sums in another order: of fp32 numbers, and of gradients that travel in bf16
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}


def first_moment(run: Path) -> Tensor:
    """Of all weights that train, fp32 [N], in an order that is the same for any ranks."""
    saved = Saved(committed(run / "checkpoints")[0])
    pieces: dict[tuple[str, int], Tensor] = {}
    for file in saved.manifest["files"]:
        if file["kind"] == "exp_avg":
            with safe_open(saved.folder / file["name"], "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    name, _, start = key.rpartition("@")
                    pieces[name, int(start)] = opened.get_tensor(key).float()
    return torch.cat([pieces[key] for key in sorted(pieces)])


def moved(arguments: Sequence[str], runs: Path, name: str, *sets: str) -> Tensor:
    every = ("run.steps=1", "train.updates_per_step=1", "train.micro_batch=2",
             "train.max_grad_norm=1e9", *sets)  # fmt: skip
    finished(train([*arguments, *(part for s in every for part in ("--set", s))], name))
    return first_moment(runs / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options, arguments = parser.parse_known_args()
    runs = options.out / "runs"
    right = moved(arguments, runs, "one-bucket", "distributed.stage=1")
    recipe = runs / "one-bucket" / "recipe.yaml"
    precision = check(read_yaml(recipe.read_text(), str(recipe)), str(recipe)).distributed.precision
    bucket = f"distributed.reduce_bucket={len(right) // BUCKETS + 1}"
    wrong = []
    for stage, overlap in STAGES:
        name = f"stage-{stage}{'-overlap' if overlap else ''}"
        sets = (f"distributed.stage={stage}", f"distributed.overlap={str(overlap).lower()}", bucket)
        error = float((moved(arguments, runs, name, *sets) - right).norm() / right.norm())
        print(f"{name}: {error:.1e} from one bucket at stage 1")
        if not error <= LIMITS[precision] or math.isnan(error):
            wrong.append(name)
    if wrong:
        raise SystemExit(f"the gradient differs at {', '.join(wrong)}")


if __name__ == "__main__":
    main()

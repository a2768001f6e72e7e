"""Every arm with every seed: the rows of the toy's CSV, and where the samples lie.

A seed pre-trains one policy, which all its arms start from; so arms are compared within seeds.
"""

from __future__ import annotations

import multiprocessing
import platform
import time

import torch
from torch import Tensor

from pages import revision
from toy.train import Run, positions
from toy.world import Toy, measures, pretrain

START = "pretrained"


def origin() -> dict[str, str]:
    """What every row says of where it comes from."""
    return {
        "revision": revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def of_seed(
    toy: Toy, seed: int, where: dict[str, str]
) -> tuple[list[dict[str, str]], dict[str, Tensor]]:
    """A CSV row for the pre-trained policy and each arm, and where their samples lie."""
    torch.set_num_threads(1)
    places: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    start = time.process_time()
    policy = pretrain(toy.layout, toy.pretraining, seed)
    seconds[START] = time.process_time() - start
    places[START] = positions(policy, toy.training, seed)
    for arm in toy.arms:
        start = time.process_time()
        run = Run(toy, arm, seed, policy)
        run.train()
        seconds[arm] = time.process_time() - start
        places[arm] = run.positions()
    rows = [
        {"arm": arm, "seed": str(seed), "cpu_seconds": f"{seconds[arm]:.1f}", **where}
        | {name: f"{value:.6g}" for name, value in measures(toy.layout, x_B2).items()}
        for arm, x_B2 in places.items()
    ]
    return rows, places


def of_all_seeds(toy: Toy, processes: int) -> tuple[list[dict[str, str]], dict[str, Tensor]]:
    """The rows of all seeds, so many trained at a time, and where seed 0's samples lie."""
    where = origin()
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        pending = [pool.apply_async(of_seed, (toy, seed, where)) for seed in range(toy.seeds)]
        found = []
        for seed, result in enumerate(pending):
            found.append(result.get())
            print(f"seed {seed} done", flush=True)
    return [row for rows, _ in found for row in rows], found[0][1]

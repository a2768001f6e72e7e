"""How long a recipe takes: a model of it, from counted FLOPs and assumed rates, not a measurement.

    seconds = FLOPs of a phase / (share of it that is reached x the GPU's matmul rate)

FLOPs are counted on fake tensors (shadow.py). The rate is what one H100 or H200 was published to
reach in bf16 matmuls without sparsity, 80 % of 989 TFLOP/s; the shares are derived from how many
bytes the eager model moves. Rewards, saving and the wait for other ranks are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from gardo.planner.geometry import Geometry
from gardo.planner.memory import BYTES
from gardo.planner.shadow import Shadow
from gardo.recipe import Recipe

MATMUL = 790e12  # FLOP/s, assumed of a GPU
SHARE = {"sample": 0.46, "teachers": 0.46, "train": 0.43}  # assumed, of eager bf16
# of a forward pass; counted, at published widths, by `./run bench checkpointing`
AGAIN = {"none": 0.0, "matmuls": 0.0, "selective": 0.9, "full": 1.0}
NVLINK, NETWORK = 400e9, 50e9  # bytes/s that a GPU receives, assumed within and between nodes


@dataclass(frozen=True)
class Seconds:
    """Of an iteration, each rank."""

    phases: dict[str, float]
    gathering: float  # if nothing of it hides behind the arithmetic
    flops: float

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def seconds(recipe: Recipe, shadow: Shadow, plan: Geometry, world: int, nodes: int) -> Seconds:
    forward, both = shadow.flops(backward=False), shadow.flops(backward=True)
    rows = plan.rows * recipe.train.updates_per_step
    again = AGAIN[recipe.train.activation_checkpointing]
    flops = {
        "sample": plan.sampled_rows * recipe.sampler.steps * forward,
        "teachers": rows * recipe.teachers_per_row * forward,
        "train": rows * (both + again * forward),
    }
    times = {name: count / (SHARE[name] * MATMUL) for name, count in flops.items()}
    return Seconds(times, _gathering(recipe, shadow, plan, world, nodes), sum(flops.values()))


def _gathering(recipe: Recipe, shadow: Shadow, plan: Geometry, world: int, nodes: int) -> float:
    settings = recipe.distributed
    if settings.engine == "local" or settings.stage < 3 or world == 1:
        return 0.0
    once = (
        shadow.parameters
        * BYTES[settings.precision]
        * (world - 1)
        / world
        / (NVLINK if nodes == 1 else NETWORK)
    )
    return once * gathers(recipe, plan)


def gathers(recipe: Recipe, plan: Geometry) -> int:
    """How often an iteration of stage 3 gathers all weights, where nothing stays for another pass.

    Forward and backward for each micro-batch, and once each to sample and to ask teachers, or at
    every sampling forward.
    """
    training = 2 * plan.accumulation * recipe.train.updates_per_step
    if recipe.rollout.gather != "step":
        return training + 2
    return training + 1 + -(-plan.samples // plan.sampled) * recipe.sampler.steps

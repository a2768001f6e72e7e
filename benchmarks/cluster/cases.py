"""The cases: each one process that trains the tiny recipe, or its sizes on a real model."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from gpu_campaign import FOLDER, Step

RECIPE = "recipes/tiny_flux_gardo.yaml"
COUNTS = (1, 2, 4, 8)
IMAGES = ("data.prompts_per_step=8", "data.images_per_prompt=12")  # for 1, 2, 4 and 8 GPUs alike
RARELY = ("evaluate.every=1000", "evaluate.prompt_count=2", "evaluate.images_per_prompt=4",
          "checkpoint.every=1000")  # fmt: skip
# hpZ's copies of the weights would not see an exchange with a slot: an algorithm without one
NO_SLOTS = "algorithm={name: flow_grpo, beta: 0.0}"
LAUNCH = ("-m", "deepspeed.launcher.runner", "--log_level", "error")


@dataclass(frozen=True)
class Plan:
    """What all cases share; `images` and `steps` of an iteration's size and a run's length."""

    gpus: int
    model: str | None = None  # a folder or hub id of Flux; the built-in one if left out
    quick: bool = False

    @property
    def sets(self) -> tuple[str, ...]:
        size = ("data.prompts_per_step=2", "data.images_per_prompt=4") if self.quick else IMAGES
        steps = f"run.steps={2 if self.quick else 4}"
        at_once = "train.micro_batch=null"
        if self.model is None:
            return (*size, *RARELY, steps, at_once)
        return (
            *size, *RARELY, steps,
            f"model={{family: flux, path: {self.model!r}, size: [512, 512], text_tokens: 128}}",
            "rewards.tiny_fidelity=null",  # its net is one for 32 pixels
            "train.keep_all_rows=true",  # the tiny rewards may say the same of every large picture
            "train.activation_checkpointing=full", "distributed.precision=bfloat16",
            "train.micro_batch=6", "rollout.batch=6", "evaluate.batch=1",
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    gpus: int
    sets: tuple[str, ...] = ()
    module: str = "gardo.train"

    def step(self, plan: Plan, limit: float) -> Step:
        """As gpu_campaign.py runs it."""
        port, ranks = str(free_port()), str(self.gpus)
        every = (*plan.sets, *self.sets, f"run.folder={FOLDER}/runs")
        sets = tuple(part for setting in every for part in ("--set", setting))
        train = ("-m", "gardo.cli", "train", RECIPE, "--gpus", ranks, "--port", port, *sets)
        command = {
            "gardo.train": train,
            "cluster.resume": ("-m", "cluster.resume", "--out", FOLDER, *train[3:]),
            "cluster.asked": ("-m", "cluster.resume", "--asked", "--out", FOLDER, *train[3:]),
            "cluster.gradients": ("-m", "cluster.gradients", "--out", FOLDER, *train[3:]),
            "cluster.bandwidth": (*LAUNCH, "--num_gpus", ranks, "--master_port", port, "--module",
                                  "cluster.bandwidth", *(("--quick",) if plan.quick else ())),
        }[self.module]  # fmt: skip
        return Step(self.name, self.what, command, limit, 0.0, needs=())


def cases(gpus: int) -> list[Case]:
    """In order of worth, for so many GPUs of one machine."""
    node = gpus // 2 if gpus >= 4 else gpus

    def pair(name: str, what: str, field: str, values: tuple[str, ...], *more: str) -> list[Case]:
        return [Case(f"{name}-{v}", what, gpus, (f"{field}={v}", *more)) for v in values]

    return [
        Case("bandwidth", "all-gather and all-reduce of torch", gpus, (), "cluster.bandwidth"),
        *(Case(f"gpus-{n}", "throughput, ZeRO-3", n) for n in COUNTS if n <= gpus),
        Case("resume", "killed, and the same bits after going on", gpus,
             ("run.deterministic=true", "checkpoint.every=1"), "cluster.resume"),
        Case("asked", "asked to end, and the same bits after going on", gpus,
             ("run.deterministic=true", "checkpoint.every=1"), "cluster.asked"),
        Case("gradients", "ZeRO's stages in three buckets, overlapped or not: the same gradient",
             gpus, (), "cluster.gradients"),
        *pair("gather", "weights once a phase, or at every forward", "rollout.gather",
              ("iteration", "step")),
        *pair("overlap", "gradients travel during the backward pass, or after it",
              "distributed.overlap", ("true", "false")),
        *pair("stage", "the base whole on every GPU; optimizer state, gradients shared out",
              "distributed.stage", ("1", "2")),
        *pair("hpz", "a second copy of the weights among so many GPUs", "distributed.hpz",
              tuple(dict.fromkeys(("1", str(node)))), NO_SLOTS),
        *pair("offload", "to host memory", "distributed.offload", ("optimizer", "parameters")),
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""DeepSpeed ZeRO, stages 0 to 3.

What is partitioned over the ranks grows with the stage: optimizer state, gradients, weights. The
loop and the pipelines call the module itself, never the DeepSpeed engine's forward.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from gardo.distributed.base import (
    DistributedSettings,
    RolloutSettings,
    check_step,
    held,
    host_memory,
    ranks_here,
    spoiling,
)
from gardo.distributed.blocks import keep_parameters, leaves_of, make_leaves
from gardo.distributed.gather import (
    Forecast,
    GatherEach,
    GatherOnce,
    choose_gather,
    forget_forward,
)
from gardo.distributed.group import Group
from gardo.distributed.optimizers import OptimizerSettings, build_optimizer
from gardo.distributed.shards import FlatShards, PartitionShards, Shards, WholeShards
from gardo.distributed.slots import Slots
from gardo.distributed.zero_config import zero_config
from gardo.types import Phase, no_phase

Load = Callable[..., None]  # load(place=..., reads=...)


def start_process_group(device: torch.device, timeout: float) -> Group:
    """Joins the launcher's process group, or makes one of a single rank.

    A rank waits `timeout` seconds for the others before it fails.
    """
    # Said before DeepSpeed asks: its own answer runs gcc and nvcc for every op it has, and then
    # compiles the shared-memory one, which gloo does without.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.utils.nvtx.enable_nvtx = False  # it marks each of its functions, 900 a pass
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        # on CPUs DeepSpeed counts ranks by running numactl, at every reduction, unless it is told
        ("LOCAL_SIZE", str(ranks_here(int(os.environ.get("WORLD_SIZE", "1"))))),
    ):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0" if os.environ["WORLD_SIZE"] == "1" else "29500"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            "nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout),
        )
    return Group(device, rank=dist.get_rank(), world=dist.get_world_size())


def _wait_at_most(timeout: float) -> None:
    """Of the groups that DeepSpeed has made too, where torch gives NCCL ten minutes."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


class ZeroEngine(Group):
    """Trains the parameters of `module` that require gradients.

    `load` gives the module its weights one at a time (`load(place=..., reads=...)`): at stage 3
    only rank 0 reads them, and each is partitioned before the next is read. `blocks` are the units
    in which stage 3 gathers; `forecast` says what it takes to gather them all at once.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        load: Load,
        blocks: Sequence[nn.Module],
        optimizer: OptimizerSettings,
        settings: DistributedSettings,
        rollout: RolloutSettings,
        forecast: Callable[[], Forecast],
        accumulation: int,
        max_grad_norm: float,
        device: torch.device,
    ) -> None:
        start_process_group(device, settings.timeout)
        super().__init__(device, rank=dist.get_rank(), world=dist.get_world_size())
        self._stage, self._settings = settings.stage, settings
        self._max_grad_norm = max_grad_norm
        config = zero_config(
            settings,
            blocks=blocks,
            module=module,
            accumulation=accumulation,
            max_grad_norm=max_grad_norm,
        )
        if self._stage == 3:
            leaves = leaves_of(module, blocks)
            make_leaves(leaves)
            load(place=_Partitioner(config), reads=self.rank == 0)
        else:
            load()
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._parameters: list[nn.Parameter] = list(trainable.values())
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(self._parameters, optimizer),
            config=config,
            dist_init_required=False,
        )
        if self._stage == 3:
            keep_parameters(leaves)
        _wait_at_most(settings.timeout)
        self.optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        self.shards = self._make_shards(trainable)
        self._gather: GatherOnce | GatherEach | None = None
        self._has_trained = False
        self.gather_note = ""
        if self._stage == 3:
            self._gather, self.gather_note = choose_gather(
                module,
                blocks,
                self._engine.optimizer.parameter_offload,
                engine=self,
                settings=settings,
                rollout=rollout,
                free=_free_memory(self.device, self.world),
                forecast=forecast,
            )
        self.phase: Phase = no_phase
        self.grad_norm = float("nan")
        self.skipped = False
        self.slots = self.make_slots(())

    def _make_shards(self, trainable: dict[str, Any]) -> Shards:
        if self._stage == 0:
            return WholeShards(trainable)
        if self._stage == 3:
            return PartitionShards(self._engine.optimizer, trainable, rank=self.rank)
        return FlatShards(self._engine.optimizer, trainable)

    def make_slots(self, names: Sequence[str]) -> Slots:
        self.slots = Slots(self.shards, names, host=self._settings.slots == "host")
        return self.slots

    @contextmanager
    def reading(self, weights: str) -> Iterator[None]:
        if self._gather and not self._has_trained:
            forget_forward(self._engine.optimizer.parameter_offload)
        gathered = self._gather() if self._gather else nullcontext()
        with held(self.phase, self.slots.use(weights), gathered):
            yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._has_trained = True
        # DeepSpeed does this in its engine's forward, which we do not call. Without it each
        # micro-batch overwrites the gradient of the one before it.
        if self._stage:
            self._engine.optimizer.clear_backward_seen_flag()
        # Told, not counted: an update may have fewer micro-batches than `accumulation`.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(spoiling(loss))

    def step(self) -> bool:
        check_step(self.slots)
        boundary = bool(self._engine.is_gradient_accumulation_boundary())
        if boundary and self._stage == 0:
            self.grad_norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
            self.skipped = not math.isfinite(self.grad_norm)
            if self.skipped:  # DeepSpeed looks at no gradient at this stage
                self._engine.set_gradient_accumulation_boundary(False)
                self._engine.zero_grad()
        self._engine.step()
        if boundary and self._stage:
            self.skipped = bool(self._engine.optimizer.overflow)
            norm = None if self.skipped else self._engine.get_global_grad_norm()
            self.grad_norm = math.nan if norm is None else float(norm)
        return boundary

    def close(self) -> None:
        self._engine.destroy()


class _Partitioner:
    """Takes each parameter apart as soon as it is there; rank 0's values count."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._first: Any = None  # a parameter that knows how to convert others

    def __call__(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        module.register_parameter(name, parameter)
        if self._first is not None:
            self._first.convert_to_zero_parameters([parameter])
            return
        self._first = parameter
        holder = nn.Module()
        holder.register_parameter(name, parameter)
        deepspeed.zero.Init(
            module=holder,
            config_dict_or_path=self._config,
            dtype=parameter.dtype,
            mem_efficient_linear=False,
        )


def _free_memory(device: torch.device, ranks: int) -> int:
    """Bytes that this rank may still use: of its GPU, or its share of the host."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return host_memory(ranks)

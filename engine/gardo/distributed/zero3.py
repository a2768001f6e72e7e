"""DeepSpeed ZeRO-3: the only file that imports deepspeed.

Weights, gradients and optimizer state are partitioned over the ranks; DeepSpeed's module hooks
gather what a forward needs. The loop and the pipelines call the module itself, never the DeepSpeed
engine's forward.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param
from torch import Tensor, nn

from gardo.distributed.base import OptimizerSettings, adamw, check_step
from gardo.distributed.slots import Slots
from gardo.types import Metrics


class _Partitions:
    """ZeRO-3's shards of the trainable parameters."""

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._engine = engine
        self._parameters: Sequence[Any] = parameters  # to which DeepSpeed adds ds_tensor

    def live(self) -> Sequence[Tensor]:
        return [p.ds_tensor for p in self._parameters]

    def masters(self) -> Sequence[Tensor]:
        return [safe_get_local_fp32_param(p) for p in self._parameters]

    def settle(self) -> None:
        self._engine.optimizer.parameter_offload.partition_all_parameters()


def start_process_group(device: torch.device) -> None:
    """Joins the launcher's process group, or makes one of a single rank."""
    # The shared-memory op is compiled with g++ at start; gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0" if os.environ["WORLD_SIZE"] == "1" else "29500"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            "nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )


def zero_config(
    *, accumulation: int, max_grad_norm: float, precision: Literal["float32", "bfloat16"]
) -> dict[str, Any]:
    """DeepSpeed's JSON, every value spelled out.

    Persistence is off because slots exchange shard contents: a parameter that DeepSpeed keeps
    gathered would not see it.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports it; the loop cuts the batches
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bfloat16"},
        # bf16 sums of many micro-batches lose the small ones
        **({"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bfloat16" else {}),
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": 500_000_000,
            "stage3_prefetch_bucket_size": 500_000_000,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,  # it replaces F.linear everywhere, and its last bits
        },
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


class Zero3Engine:
    """Trains the parameters of `module` that require gradients."""

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerSettings,
        accumulation: int,
        max_grad_norm: float,
        precision: Literal["float32", "bfloat16"],
        device: torch.device,
    ) -> None:
        start_process_group(device)
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._trainable: dict[str, Any] = {  # DeepSpeed adds ds_shape to the parameters
            n: p for n, p in module.named_parameters() if p.requires_grad
        }
        parameters = list(self._trainable.values())
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(parameters, optimizer),
            config=zero_config(
                accumulation=accumulation, max_grad_norm=max_grad_norm, precision=precision
            ),
            dist_init_required=False,
        )
        self._shards = _Partitions(self._engine, parameters)
        self.grad_norm = float("nan")
        self.slots = self.make_slots(())

    def make_slots(self, names: Sequence[str]) -> Slots:
        self.slots = Slots(self._shards, names)
        return self.slots

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed counts micro-steps in its engine's forward, which we do not call; without the
        # count each micro-batch overwrites the gradient of the one before it.
        self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss)

    def step(self) -> bool:
        check_step(self.slots)
        boundary = bool(self._engine.is_gradient_accumulation_boundary())
        self._engine.step()
        if boundary:
            self.grad_norm = float(self._engine.get_global_grad_norm())
        return boundary

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self.world == 1:
            return tensor
        tensor = tensor.contiguous()
        boolean = tensor.dtype == torch.bool
        sent = tensor.to(torch.uint8) if boolean else tensor
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(parts, sent)
        gathered = torch.cat(parts)
        return gathered.bool() if boolean else gathered

    def agree_max(self, value: int) -> int:
        return int(self._all_reduce([float(value)], dist.ReduceOp.MAX)[0])

    def reduce(self, metrics: Metrics) -> Metrics:
        names, maxima = sorted(metrics.sums), sorted(metrics.maxima)
        flat = [x for n in names for x in metrics.sums[n]]
        total = iter(self._all_reduce(flat, dist.ReduceOp.SUM)) if flat else iter(())
        reduced = Metrics()
        reduced.sums = {n: (next(total), next(total)) for n in names}
        if maxima:
            highest = self._all_reduce([metrics.maxima[n] for n in maxima], dist.ReduceOp.MAX)
            reduced.maxima = dict(zip(maxima, highest, strict=True))
        return reduced

    def _all_reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def gather_weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for name, parameter in self._trainable.items():
            full = safe_get_full_fp32_param(parameter)  # a collective: every rank asks
            if self.rank == 0:
                weights[name] = full.detach().float().cpu().reshape(parameter.ds_shape).clone()
        return weights

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        self._engine.destroy()

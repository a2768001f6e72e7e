"""DeepSpeed's JSON, generated: every value spelled out, nothing "auto", sizes from the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gardo.distributed.base import DistributedSettings

SMALLEST_BUCKET = 500_000  # elements; below it a collective is all latency


def numel(parameters: Sequence[nn.Parameter]) -> int:
    """Elements, also of parameters that ZeRO-3 has taken apart."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)


def zero_config(
    settings: DistributedSettings,
    *,
    blocks: Sequence[nn.Module],
    module: nn.Module,
    accumulation: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """The configuration of a run.

    With stage 3, while one block runs the next is gathered: the prefetch bucket is the largest
    block, and so is the reuse distance, so that the last block of the forward pass stays for the
    backward pass. A reduce bucket holds one block's gradients. Persistence is off unless asked for,
    because slots exchange shard contents: a parameter that DeepSpeed keeps gathered would not see
    it. Clipping at stage 0 is the engine's own: DeepSpeed keeps no gradient norm there.
    """
    block = max(numel(list(b.parameters())) for b in blocks)
    trained = max(numel([p for p in b.parameters() if p.requires_grad]) for b in blocks)
    outside = numel(list(module.parameters())) - sum(numel(list(b.parameters())) for b in blocks)
    half = settings.precision == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports it; the loop cuts the batches
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm if settings.stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload: torch's fused AdamW, no C++ build
        "bf16": {
            "enabled": half,
            "check_grad_overflow": True,  # skips an update whose gradient is not finite
            "bf16_master_weights_and_grads": settings.masters == "bfloat16",
            "bf16_optimizer_states": settings.masters == "bfloat16",
        },
        # bf16 sums of many micro-batches lose the small ones
        "data_types": {"grad_accum_dtype": settings.masters if half else "float32"},
        "zero_optimization": {
            "stage": settings.stage,
            "contiguous_gradients": True,
            "overlap_comm": _overlaps(settings),
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": settings.reduce_bucket or max(trained, SMALLEST_BUCKET),
            "allgather_bucket_size": max(block, SMALLEST_BUCKET),
            "memory_efficient_linear": False,  # it replaces F.linear everywhere, and its last bits
            "offload_optimizer": _offload(settings.offload in ("optimizer", "parameters"), half),
            **(_stage_3(settings, block, outside) if settings.stage == 3 else {}),
        },
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def _overlaps(settings: DistributedSettings) -> bool:
    """Stage 1 reduces when the backward pass is over, so there is nothing to overlap with; and
    DeepSpeed 0.19 then sums wrongly if the gradients take more than one bucket. Stage 2 must be
    asked: its other stream is None on a CPU, so no test of ours has seen it."""
    if settings.overlap is None:
        return settings.stage == 3
    return settings.overlap and settings.stage >= 2


def _stage_3(settings: DistributedSettings, block: int, outside: int) -> dict[str, Any]:
    def chosen(value: int | None, default: int) -> int:
        return default if value is None else value

    return {
        "offload_param": _offload(settings.offload == "parameters", pin=True),
        "stage3_prefetch_bucket_size": chosen(settings.prefetch_bucket, block),
        "stage3_max_live_parameters": chosen(settings.live_parameters, outside + 3 * block),
        "stage3_max_reuse_distance": chosen(settings.reuse_distance, block),
        "stage3_param_persistence_threshold": settings.persistence_threshold,
        "sub_group_size": settings.sub_group,
        "zero_hpz_partition_size": settings.hpz,
        "stage3_gather_16bit_weights_on_model_save": False,
    }


def _offload(on: bool, pin: bool) -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": pin} if on else {"device": "none"}

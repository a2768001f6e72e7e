"""DeepSpeed's Adams, for the table of optimizers; they are compiled when one is first made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn


def fused(parameters: Sequence[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = FusedAdam(parameters, **settings)
    return optimizer


def cpu(parameters: Sequence[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Adam in host memory, whose step is a function of its state; moments have the weights' dtype.

    No subclass: with bf16 masters ZeRO wants this very class.
    """
    wide = parameters[0].dtype == torch.float32
    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
        parameters, fp32_optimizer_states=wide, **settings
    )
    optimizer.register_step_pre_hook(_forget_powers)
    return optimizer


def _forget_powers(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Its C++ half multiplies the powers of beta up from step to step, and takes pow() where a
    resumed run starts, which has other last bits: so it starts at every step."""
    group = optimizer.defaults
    optimizer.ds_opt_adam.destroy_adam(optimizer.opt_id)
    optimizer.ds_opt_adam.create_adam(
        optimizer.opt_id, group["lr"], *group["betas"], group["eps"], group["weight_decay"],
        optimizer.adam_w_mode, False,
    )  # fmt: skip

"""The optimizers that a recipe can name, a row each; all are AdamW (arXiv 1711.05101).

A row says what a moment takes and what the optimizer needs: what two settings rule out is refused
with the recipe, what this machine lacks before anything loads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from gardo.settings import FieldError, Pair, Strict, check_installed

if TYPE_CHECKING:
    from torch import Tensor, nn

Parameters = Sequence["nn.Parameter"]
Name = Literal[
    "adamw", "adamw_8bit", "adamw_paged", "adamw_8bit_paged", "deepspeed_fused", "deepspeed_cpu"
]
FIELD = "train.optimizer.name"


class OptimizerSettings(Strict):
    """AdamW as Flow-GRPO and GARDO use it, by whom and in how many bits."""

    name: Name = Field(
        "adamw",
        description="adamw: torch's, in one pass; adamw_8bit: moments in 8 bits (bitsandbytes); "
        "_paged: moments that move to host memory where a GPU is short of it (bitsandbytes); "
        "deepspeed_fused, deepspeed_cpu: DeepSpeed's, for GPUs and for offload",
    )
    lr: float = Field(
        3e-4,
        gt=0,
        description="learning rate, constant; 3e-4 is Flow-GRPO's for a LoRA, full fine-tuning "
        "wants less",
    )
    betas: Pair[Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999),
        description="decay of the first and of the second moment",
    )
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled, times lr")


@dataclass(frozen=True)
class Optimizer:
    """A row of the table."""

    build: Callable[..., torch.optim.Optimizer]  # (parameters, lr, betas, eps, weight_decay)
    moments: float  # bytes of both, a trained weight with fp32 masters
    masters: float  # the same with bf16 masters
    package: str | None = None  # to install
    gpu: bool = False  # has no kernels for CPUs
    offload: bool | None = None  # True: only with the masters in host memory; False: never
    compiler: str | None = None  # builds it when it is first used
    deepspeed: bool = False  # needs DeepSpeed's engine


def _torch(parameters: Parameters, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def build(parameters: Parameters, **settings: Any) -> torch.optim.Optimizer:
        from bitsandbytes import optim

        optimizer: torch.optim.Optimizer = getattr(optim, name)(parameters, **settings)
        return optimizer

    return build


def _deepspeed(name: str) -> Callable[..., torch.optim.Optimizer]:
    def build(parameters: Parameters, **settings: Any) -> torch.optim.Optimizer:
        from gardo.distributed import deepspeed_adam

        optimizer: torch.optim.Optimizer = getattr(deepspeed_adam, name)(parameters, **settings)
        return optimizer

    return build


BLOCKS = 2 + 2 * 4 / 256  # 8-bit moments and their scales, fp32 for each 256
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_torch, 8, 4),
    "adamw_8bit": Optimizer(_bitsandbytes("AdamW8bit"), BLOCKS, BLOCKS, "bitsandbytes"),
    "adamw_paged": Optimizer(
        _bitsandbytes("PagedAdamW32bit"), 8, 8, "bitsandbytes", gpu=True, offload=False
    ),
    "adamw_8bit_paged": Optimizer(
        _bitsandbytes("PagedAdamW8bit"), BLOCKS, BLOCKS, "bitsandbytes", gpu=True, offload=False
    ),
    "deepspeed_fused": Optimizer(
        _deepspeed("fused"), 8, 4, gpu=True, offload=False, compiler="nvcc", deepspeed=True
    ),
    "deepspeed_cpu": Optimizer(
        _deepspeed("cpu"), 8, 4, offload=True, compiler="g++", deepspeed=True
    ),
}


def build_optimizer(parameters: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of the settings; what it needs is here (`check_here`)."""
    shared = settings.model_dump(exclude={"name"})
    return OPTIMIZERS[settings.name].build(parameters, **shared)


def moment_bytes(name: str, masters: str = "float32") -> float:
    """Bytes of both moments a trained weight, where the optimizer's weights are of that dtype."""
    row = OPTIMIZERS[name]
    return row.moments if masters == "float32" else row.masters


# ---- what does not go together, or is not here ---------------------------------------------------


def check_optimizer(name: str, *, engine: str, offload: str, masters: str) -> None:
    """FieldError where an optimizer does not go with the settings of `distributed`."""
    row, offloads = OPTIMIZERS[name], offload != "none"
    if row.deepspeed and engine == "local":
        raise FieldError(f"{FIELD}: {name} is DeepSpeed's, engine local has none; use adamw")
    if row.offload is True and not offloads:
        raise FieldError(
            f"{FIELD}: {name} updates weights in host memory; use distributed.offload: optimizer, "
            "or adamw"
        )
    if row.offload is False and offloads:
        raise FieldError(
            f"{FIELD}: {name} updates weights on a GPU, distributed.offload: {offload} keeps them "
            "in host memory; use adamw or deepspeed_cpu, or offload: none"
        )
    if masters == "bfloat16" and offloads and row.offload is not True:
        raise FieldError(
            f"{FIELD}: {name} does not update bf16 masters in host memory; use deepspeed_cpu, or "
            "distributed.masters: float32"
        )


def check_here(name: str, device: torch.device) -> None:
    """FieldError where this machine lacks what an optimizer needs."""
    row = OPTIMIZERS[name]
    if row.package:
        check_installed(row.package, f"{FIELD}: {name}")
    if row.gpu and device.type != "cuda":
        raise FieldError(
            f"{FIELD}: {name} needs an NVIDIA GPU, this run is on the {device.type}; use "
            f"{name.removesuffix('_paged') if row.package else 'adamw'}"
        )
    if row.compiler is None:
        return
    for tool in (row.compiler, "ninja"):
        if not _has(tool):
            raise FieldError(
                f"{FIELD}: {name} is compiled when it is first used, and there is no {tool}; "
                "install it, or use adamw"
            )


def _has(tool: str) -> bool:
    if tool == "nvcc":
        from torch.utils.cpp_extension import CUDA_HOME

        return CUDA_HOME is not None and shutil.which("nvcc", path=f"{CUDA_HOME}/bin") is not None
    return shutil.which(tool) is not None


# ---- their state ---------------------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq")  # of the gradient and of its square


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, str] | None:
    """What the optimizer calls its moments; None where they are not laid out like the weights."""
    if not _is_bitsandbytes(optimizer):
        return MOMENTS
    return None if optimizer.args.optim_bits == 8 else ("state1", "state2")  # type: ignore[attr-defined]


def prepare_moments(optimizer: torch.optim.Optimizer, homes: Sequence[Tensor]) -> None:
    """Makes the state of the tensors that no step has updated yet: zeros, and no update done.

    Not for 8-bit moments, which start with their first step.
    """
    names = moments_of(optimizer) or ()
    for home in homes:
        state = optimizer.state[home]
        if state:
            continue
        state["step"] = 0
        if type(optimizer) is torch.optim.AdamW:  # fused: counts on the device
            state["step"] = torch.zeros((), dtype=torch.float32, device=home.device)
        state.update({name: _buffer(optimizer, home) for name in names})


def _buffer(optimizer: Any, home: Tensor) -> Tensor:
    if _is_bitsandbytes(optimizer):
        buffer: Tensor = optimizer.get_state_buffer(home)
        return buffer
    wide = getattr(optimizer, "fp32_optimizer_states", False)
    return torch.zeros_like(home, dtype=torch.float32 if wide else None)


def set_updates(state: dict[str, Any], updates: int) -> None:
    """Makes a state that of a tensor which so many steps have updated."""
    if isinstance(state["step"], torch.Tensor):
        state["step"].fill_(updates)
    else:
        state["step"] = updates


def load_blocks(optimizer: Any, home: Tensor, stored: dict[str, Tensor], updates: int) -> None:
    """Gives a tensor the 8-bit state `stored` (names as in the optimizer), in pages where the
    optimizer would have it so."""
    state = optimizer.state[home]
    for name, value in stored.items():
        if name in ("state1", "state2"):
            state[name] = optimizer.get_state_buffer(home, dtype=value.dtype)
            state[name].copy_(value.view_as(state[name]))
        else:
            state[name] = value.to(home.device)
    if stored:
        state["step"] = updates


def _is_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes")

"""What the loop asks of an engine, and the settings of the gradient step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from gardo.distributed.slots import Slots
from gardo.settings import Pair, Strict
from gardo.types import Metrics

Record = TypeVar("Record")


class OptimizerSettings(Strict):
    """AdamW as Flow-GRPO and GARDO use it."""

    name: str = Field("adamw", pattern="^adamw$")
    lr: float = Field(3e-4, gt=0)
    betas: Pair[float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)


def adamw(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


class Engine(Protocol):
    """One process or many: the loop does not know."""

    rank: int
    world: int
    device: torch.device
    slots: Slots
    grad_norm: float

    def make_slots(self, names: Sequence[str]) -> Slots: ...
    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss`, the mean over this micro-batch."""

    def step(self) -> bool:
        """Counts a micro-batch; at the end of an update clips, steps, and returns True."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all ranks, concatenated along the first axis in rank order."""

    def agree_max(self, value: int) -> int:
        """The largest value of all ranks."""

    def reduce(self, metrics: Metrics) -> Metrics:
        """Sums, counts and maxima over all ranks; every rank must have the same names."""

    def gather_weights(self) -> dict[str, Tensor]:
        """The trainable weights in fp32 on the CPU by parameter name; empty except on rank 0."""

    def barrier(self) -> None: ...
    def close(self) -> None: ...


def gather_record(engine: Engine, record: Record) -> Record:
    """A dataclass of [B, ...] tensors with the samples of all ranks, in rank order."""

    def gathered(value: Any) -> Any:
        if isinstance(value, Tensor):
            return engine.all_gather(value)
        if isinstance(value, dict):
            return {k: gathered(v) for k, v in value.items()}
        return value

    names = [f.name for f in fields(record)]  # type: ignore[arg-type]
    changed = {name: gathered(getattr(record, name)) for name in names}
    return replace(record, **changed)  # type: ignore[type-var]


def leave_process_group() -> None:
    """The end of a launched process; nothing to do where there was no group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_step(slots: Slots) -> None:
    """No optimizer step while other weights stand in for the live ones."""
    if slots.exchanged is not None:
        raise RuntimeError(f"optimizer step while slot {slots.exchanged!r} is in use")

"""What the loop asks of an engine, and the settings of the gradient step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import psutil
import torch
from pydantic import Field

from gardo.distributed.shards import Shards
from gardo.distributed.slots import Slots
from gardo.settings import Strict
from gardo.types import Metrics, Phase

if TYPE_CHECKING:
    from torch import Tensor


def _no_default(schema: dict[str, Any]) -> None:
    """For a field whose value, if left out, another section decides."""
    del schema["default"]


class DistributedSettings(Strict):
    """How a run spreads over ranks. Sizes left out are chosen from the model's blocks."""

    engine: Literal["local", "zero"] = Field(
        "zero", description="local: one process, fp32, no DeepSpeed"
    )
    stage: Literal[0, 1, 2, 3] = Field(
        3,
        description="what ZeRO partitions: 0 nothing, 1 optimizer state, 2 also gradients, 3 also "
        "weights; if left out 1 for a LoRA, whose base is then whole on every rank, 3 for full "
        "fine-tuning",
        json_schema_extra=_no_default,
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of forward and backward passes; float32 for the tiny models, bfloat16 for "
        "full size",
    )
    masters: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the optimizer's weights; bfloat16 (moments and gradient sums "
        "too) saves 8 bytes a trained weight and loses small steps"
    )  # fmt: skip
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="to host memory: the optimizer state, or that and the weights (stage 3)"
    )
    slots: Literal["device", "host"] = Field(
        "device",
        description="where copies of the trained weights wait (reference, old): with the masters, "
        "or in host memory",
    )
    prefetch_bucket: int | None = Field(None, ge=0, description="elements gathered ahead")
    live_parameters: int | None = Field(None, ge=1, description="elements gathered at a time")
    reuse_distance: int | None = Field(
        None, ge=0, description="elements; what is used again sooner stays gathered"
    )
    reduce_bucket: int | None = Field(None, ge=1, description="gradient elements reduced at a time")
    sub_group: int = Field(1_000_000_000, ge=1, description="elements updated at a time, stage 3")
    persistence_threshold: int = Field(
        0, ge=0, description="smaller parameters stay gathered; 0 where slots are exchanged"
    )
    hpz: int = Field(
        1, ge=1, description="ranks of a node that keep a second copy (ZeRO++ hpZ); 1 with slots"
    )
    overlap: bool | None = Field(
        None,
        description="gradients travel while the backward pass runs; if left out, at stage 3. Stage "
        "2 can too, and has not been seen to on GPUs",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads a rank; cores / ranks if left out"
    )
    timeout: float = Field(
        3600,
        gt=0,
        le=10_000_000,
        description="seconds that a rank waits for the others before the run fails",
    )

    def check(self, slots: Sequence[str]) -> None:
        """ValueError where two settings, or one and the algorithm's slots, do not go together."""
        if self.engine == "local" and self.precision != "float32":
            raise ValueError(
                f"distributed.precision: {self.precision} needs fp32 masters, which engine local "
                "has not; use engine zero"
            )
        if self.engine == "local" and self.offload != "none":
            raise ValueError(
                f"distributed.offload: {self.offload}: engine local has none; use engine zero"
            )
        if self.stage == 0 and self.precision != "float32":
            raise ValueError(
                f"distributed.precision: {self.precision} at stage 0 would sum gradients in "
                f"{self.precision}; use stage 1, 2 or 3"
            )
        if self.masters != "float32" and self.precision != "bfloat16":
            raise ValueError("distributed.masters: bfloat16 needs precision: bfloat16")
        if self.stage == 0 and self.offload != "none":
            raise ValueError("distributed.offload: stage 0 partitions nothing; use stage 1, 2 or 3")
        copies = {"persistence_threshold": self.persistence_threshold, "hpz": self.hpz - 1}
        only_3 = {**copies, "offload": self.offload == "parameters"}
        for field, used in only_3.items():
            if used and self.stage < 3:
                raise ValueError(
                    f"distributed.{field}: {getattr(self, field)}: only stage 3 partitions the "
                    "weights; use stage: 3"
                )
        for field, used in copies.items():
            if used and slots:
                raise ValueError(
                    f"distributed.{field}: {getattr(self, field)} keeps copies of weights that do "
                    f"not see the exchange with slot {slots[0]!r}; use {int(field == 'hpz')}"
                )


class RolloutSettings(Strict):
    """How forward-only phases run: sampling, teachers, evaluation."""

    gather: Literal["auto", "iteration", "step"] = Field(
        "auto",
        description="stage 3: gather the weights once a phase (iteration), or at every forward "
        "(step); auto: once if the plan sees room for it",
    )
    batch: Annotated[int, Field(ge=1)] | Literal["like_train"] | None = Field(
        None,
        description="images a sampling forward, each rank; as many as a micro-batch of training "
        "has rows if left out. like_train: every call of the model when sampling, by teachers and "
        "in training has as many rows, short ones being filled up: one shape, so that kernels add "
        "in one order, for up to a micro-batch of wasted rows a phase",
    )
    overlap: bool = Field(
        False,
        description="decode and score a micro-batch while the next is sampled: in a thread, on a "
        "GPU in a stream of its own. Rewards then see a micro-batch at a time",
    )
    decode_batch: int | None = Field(
        None,
        ge=1,
        description="images that the VAE decodes at once; as many as have 2 megapixels if left out",
    )


class Ranks(Protocol):
    """What ranks tell each other: group.py."""

    rank: int
    world: int
    device: torch.device

    def all_gather(self, tensor: Tensor) -> Tensor: ...
    def agree_max(self, value: int) -> int: ...
    def reduce(self, metrics: Metrics) -> Metrics: ...
    def barrier(self) -> None: ...


class Engine(Ranks, Protocol):
    """One process or many: the loop does not know."""

    shards: Shards  # where this rank's pieces of the trained weights are
    slots: Slots
    grad_norm: float  # of the last update, before clipping
    skipped: bool  # the last update was not made: its gradient was not finite
    gather_note: (
        str  # how forward-only phases get the weights, and why; "" where that is no question
    )

    phase: Phase  # what measures exchanges of weights and gathers that are made once
    optimizer: torch.optim.Optimizer

    def make_slots(self, names: Sequence[str]) -> Slots: ...
    def reading(self, weights: str) -> AbstractContextManager[None]:
        """Forward passes inside read these weights ("train" or a slot), gathered once where the
        recipe and the memory allow it. No backward pass and no step may happen there."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates the gradient of `loss`, the mean over this micro-batch.

        It weighs 1 / accumulation: micro-batches that were left out count as zeros. `last` of its
        update, on every rank. A loss that is not finite spoils the update on all ranks.
        """

    def step(self) -> bool:
        """After the last micro-batch of an update clips, steps, and returns True.

        An update whose gradient is not finite is not made: see `skipped`.
        """

    def close(self) -> None: ...


def gather_text(ranks: Ranks, text: str) -> list[str]:
    """What every rank says, in rank order; as bytes in a tensor, never pickled."""
    data = text.encode(errors="backslashreplace")  # a message may end in half of a pair
    size = ranks.agree_max(len(data))
    padded = torch.frombuffer(bytearray(data.ljust(size, b" ") or b" "), dtype=torch.uint8)
    rows = ranks.all_gather(padded.to(ranks.device)[None]).cpu()
    return [bytes(row.tolist()).decode().rstrip(" ") for row in rows]


def ranks_here(world: int) -> int:
    """How many of the ranks are on this machine: as torchrun's variable or DeepSpeed's says, or all
    of them."""
    env = os.environ
    return int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world)


def host_memory(world: int) -> int:
    """Bytes of host memory that are free for one rank of this machine."""
    return psutil.virtual_memory().available // ranks_here(world)


def leave_process_group() -> None:
    """The end of a launched process; nothing to do where there was no group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def held(phase: Phase, *weights: AbstractContextManager[None]) -> Iterator[None]:
    """Inside, weights are there; getting them and putting them back is the phase `gather`."""
    with ExitStack() as there:
        with phase("gather"):
            for one in weights:
                there.enter_context(one)
        try:
            yield
        finally:
            with phase("gather"):
                there.close()


def spoiling(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN where it is not finite itself: the norm, which all ranks
    see, then says so without a question of its own."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def check_step(slots: Slots) -> None:
    """No optimizer step while other weights stand in for the live ones."""
    if slots.exchanged is not None:
        raise RuntimeError(f"optimizer step while slot {slots.exchanged!r} is in use")

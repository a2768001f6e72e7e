"""One process: the parameters are their own fp32 masters, gradients accumulate in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gardo.distributed.base import check_step, held, spoiling
from gardo.distributed.group import Group
from gardo.distributed.optimizers import OptimizerSettings, build_optimizer
from gardo.distributed.shards import Shards, WholeShards
from gardo.distributed.slots import Slots
from gardo.types import Phase, no_phase


class LocalEngine(Group):
    """Trains `trainable` of a module in this process, in fp32."""

    gather_note = ""

    def __init__(
        self,
        trainable: dict[str, nn.Parameter],
        *,
        optimizer: OptimizerSettings,
        accumulation: int,
        max_grad_norm: float,
        device: torch.device,
        host_slots: bool = False,
    ) -> None:
        super().__init__(device)
        self._parameters = list(trainable.values())
        self.shards: Shards = WholeShards(trainable)
        self.phase: Phase = no_phase
        self._host_slots = host_slots
        self.optimizer = build_optimizer(self._parameters, optimizer)
        self._accumulation = accumulation
        self._max_grad_norm = max_grad_norm
        self._last = False
        self.grad_norm = float("nan")
        self.skipped = False
        self.slots = self.make_slots(())

    def make_slots(self, names: Sequence[str]) -> Slots:
        self.slots = Slots(self.shards, names, host=self._host_slots)
        return self.slots

    @contextmanager
    def reading(self, weights: str) -> Iterator[None]:
        with held(self.phase, self.slots.use(weights)):
            yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._last = last
        (spoiling(loss) / self._accumulation).backward()

    def step(self) -> bool:
        check_step(self.slots)
        if not self._last:
            return False
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self.grad_norm = float(norm)
        self.skipped = not math.isfinite(self.grad_norm)
        if not self.skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def close(self) -> None:
        pass

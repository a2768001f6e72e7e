"""The ranks of a run, and what they tell each other outside the model's own collectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gardo.types import Metrics


class Group:
    """This rank among all of them. One alone talks to nobody and needs no process group."""

    def __init__(self, device: torch.device, *, rank: int = 0, world: int = 1) -> None:
        self.device, self.rank, self.world = device, rank, world

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all ranks, concatenated along the first axis in rank order."""
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
        """The largest value of all ranks."""
        if self.world == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.float64)
        return int(self._all_reduce({"value": agreed}, dist.ReduceOp.MAX)["value"])

    def reduce(self, metrics: Metrics) -> Metrics:
        """Sums, counts and maxima over all ranks; every rank must have the same names."""
        if self.world == 1:
            return metrics
        reduced = Metrics()
        reduced.sums = self._all_reduce(metrics.sums, dist.ReduceOp.SUM)
        reduced.maxima = self._all_reduce(metrics.maxima, dist.ReduceOp.MAX)
        return reduced

    def _all_reduce(self, values: Mapping[str, Tensor], operation: Any) -> dict[str, Tensor]:
        """fp64 tensors of one shape by name, over all ranks; on the host."""
        if not values:
            return {}
        names = sorted(values)
        stacked = torch.stack([values[n] for n in names]).to(self.device)
        dist.all_reduce(stacked, operation)
        return dict(zip(names, stacked.cpu(), strict=True))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

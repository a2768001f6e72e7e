"""The ranks of a run, and what they tell each other outside the model's own collectives."""

from __future__ import annotations

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
        """The largest value of all ranks; the host waits for them."""
        if self.world == 1:
            return value
        agreed = torch.full((), value, dtype=torch.int64, device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def reduce(self, metrics: Metrics) -> Metrics:
        """Sums, counts and maxima over all ranks, on the host; every rank must have the same names.

        One gather and one copy, for which the host waits, whatever the number of metrics.
        """
        sums, maxima = sorted(metrics.sums), sorted(metrics.maxima)
        if not sums and not maxima:
            return metrics
        pieces = [metrics.sums[n] for n in sums] + [metrics.maxima[n][None] for n in maxima]
        of_ranks = self.all_gather(torch.cat(pieces)[None]).cpu()
        reduced = Metrics()
        pairs = of_ranks[:, : 2 * len(sums)].sum(0).view(-1, 2)
        reduced.sums = dict(zip(sums, pairs, strict=True))
        reduced.maxima = dict(zip(maxima, of_ranks[:, 2 * len(sums) :].amax(0), strict=True))
        return reduced

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

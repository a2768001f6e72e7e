"""Slots: named copies of the trainable weights, held piece by piece in fp32.

Using a slot writes it where forward passes read, runs, and writes the live weights back, bit for
bit. The same code serves LoRA and full fine-tuning, one process and every ZeRO stage. Slots may
wait in host memory: then only the copy of the moment is on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from gardo.distributed.shards import Shards, masters
from gardo.lazily import no_grad

if TYPE_CHECKING:
    from torch import Tensor

LIVE = "train"


class Slots:
    """Slots by name; "train" is the live weights."""

    def __init__(self, shards: Shards, names: Sequence[str], *, host: bool = False) -> None:
        if LIVE in names:
            raise ValueError(f'a slot cannot be called "{LIVE}": that is the live weights')
        self.shards = shards
        self._slots = {n: [_fp32_copy(m, host) for m in masters(shards)] for n in names}
        self.exchanged: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def pieces(self, name: str) -> list[Tensor]:
        """This rank's fp32 pieces of a slot."""
        if name not in self._slots:
            raise KeyError(f"no slot {name!r}; the slots are {', '.join(self._slots) or 'none'}")
        return self._slots[name]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Forward passes inside see the slot's weights; no optimizer step may happen there."""
        self._check_free()
        if name == LIVE:
            yield
            return
        kept = self._exchange(self.pieces(name))
        self.exchanged = name
        try:
            yield
        finally:
            self._exchange(kept)
            self.exchanged = None

    @no_grad
    def _exchange(self, values: Sequence[Tensor]) -> list[Tensor]:
        return self.shards.exchange(values)

    @no_grad
    def copy(self, source: str, *, to: str) -> None:
        """slot `to` := slot or live weights `source`, in fp32."""
        self._check_free()
        pieces = masters(self.shards) if source == LIVE else self.pieces(source)
        for slot, piece in zip(self.pieces(to), pieces, strict=True):
            slot.copy_(piece)

    @no_grad
    def decay(self, name: str, rate: float) -> None:
        """slot := rate slot + (1 - rate) live weights, in fp32 (an exponential moving average)."""
        self._check_free()
        for slot, master in zip(self.pieces(name), masters(self.shards), strict=True):
            slot.lerp_(master.to(slot.device, torch.float32), 1.0 - rate)

    def _check_free(self) -> None:
        if self.exchanged is not None:
            raise RuntimeError(f"slot {self.exchanged!r} is in use; uses do not nest, and the live "
                               "weights are away")  # fmt: skip


def _fp32_copy(master: Tensor, host: bool) -> Tensor:
    if not host:
        return master.detach().float().clone()
    pinned = master.device.type == "cuda"
    return torch.empty(master.shape, dtype=torch.float32, pin_memory=pinned).copy_(master)
